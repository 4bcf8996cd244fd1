//! `libmemlane_shim.so`: lets the daemon watch the memory of a VMM that knows nothing of Memlane.
//!
//! Writes to shared memory are noticed in the page tables of the process that writes, and only the process
//! itself can open a userfaultfd for its page tables. So this library is loaded into the VMM
//! (`LD_PRELOAD`), connects to the daemon's attach socket, and when asked opens a userfaultfd and
//! hands it over, with the `pagemap` and `maps` of the process. Everything else the daemon does
//! through these descriptors. Any program with file-backed shared memory can be watched this way.
//!
//! The library keeps no copies, unless the daemon wants it to: when the daemon ends, the kernel lifts
//! whatever protection there was, and the guest runs on. Where pages are missing (post-copy) a copy
//! of the userfaultfd is kept, so that a thread that waits for them waits on instead of finding zeros.
//! A daemon that starts anew asks for that copy, and fetches what is still missing.
//!
//! `MEMLANE_ATTACH_SOCKET` names the socket. Where it is not set, nothing is done at all.
//!
//! # Manners in another program's process
//!
//! - Nothing of the program is replaced or called: the library exports no symbols, and lives in
//!   one thread with all signals blocked, so that the program's handlers run where they always ran.
//! - That thread has a **table of descriptors of its own**. A program that closes all descriptors
//!   which it did not open, or counts on the numbers of the next ones, never meets those of the
//!   shim, nor do its children.
//! - It prints nothing and reports no failure but to the daemon. Where a seccomp filter forbids it
//!   threads or sockets, it is simply not there, and the daemon tells the operator so.
//! - The thread starts when the library is loaded. Later would be better still, since not every
//!   process with this environment is a VMM; but no other moment is to be had without replacing
//!   functions of the program. Children that load it too (a script that sets up a tap) make an
//!   idle connection each, for as long as they run. The variable is not taken out of the
//!   environment: wrappers such as numactl and scripts would then start their VMM without it.
//! - A child that is forked has no such thread, as no thread but the forking one survives. A VMM that goes to
//!   the background by itself (QEMU's `-daemonize`) is such a child, so the thread is started anew there. It
//!   waits for a moment before it connects: most children run another program at once, and no daemon hears of them. Until
//!   then such a child has two threads, and may not enter a user namespace (`unshare`, `setns`).
//! - The thread opens `pagemap` and `maps` when it starts: a program that becomes another user (`-runas`) may not
//!   open its own any more.

mod mapped;
mod sys;
mod wire;

use std::fs::File;
use std::io::Seek;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::panic::{catch_unwind, set_hook};
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use sys::{Address, SignalsBlocked, Socket};
use wire::FromDaemon;

/// The environment variable that names the daemon's attach socket.
const VARIABLE: &str = "MEMLANE_ATTACH_SOCKET";
/// The stack size of the thread, in bytes. The thread uses some KiB, and glibc takes the program's thread-local
/// variables out of it.
const STACK_BYTES: usize = 128 << 10;
/// The first and the longest wait between two connections.
const WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
/// A child that was forked may take this long to run another program.
const IN_CHILD: Duration = Duration::from_millis(200);

/// The address of the daemon's attach socket, from when the thread is started.
static ADDRESS: OnceLock<Address> = OnceLock::new();

/// The dynamic linker calls what is listed in this section, before `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static WHEN_LOADED: extern "C" fn() = when_loaded;

extern "C" fn when_loaded() {
    // Nothing here panics as far as is known; if it did, that must not reach the program.
    let _ = catch_unwind(start);
}

fn start() {
    let Some(path) = std::env::var_os(VARIABLE) else { return };
    let Some(address) = Address::new(path.as_bytes()) else { return };
    let _ = ADDRESS.set(address);
    // Of this library's own copy of the standard library: a panic ends the thread without a word.
    set_hook(Box::new(|_| {}));
    start_thread(Duration::ZERO);
    sys::when_forked(in_child);
}

/// The C library calls this in each child that is forked.
extern "C" fn in_child() {
    let _ = catch_unwind(|| start_thread(IN_CHILD));
}

/// Starts the thread, which connects after a moment.
fn start_thread(moment: Duration) {
    let Some(address) = ADDRESS.get() else { return };
    // Before the thread starts, which inherits the mask: a signal could reach it at once.
    let _blocked = SignalsBlocked::new();
    // Without the thread there is no shim, which the daemon notices.
    let thread = thread::Builder::new().name("memlane-shim".into()).stack_size(STACK_BYTES);
    let _ = thread.spawn(move || stay_connected(address, moment));
}

fn stay_connected(address: &Address, moment: Duration) {
    if sys::leave_descriptor_table().is_err() {
        return;
    }
    // At once: a program that becomes another user may not open them afterwards.
    let mut views = Views::open();
    thread::sleep(moment);
    let mut wait = WAIT.0;
    // Not even a panic of this thread closes it.
    let mut kept = ManuallyDrop::new(None);
    loop {
        if let Ok(socket) = Socket::connect(address)
            && serve(&socket, &mut views, &mut kept)
        {
            wait = WAIT.0;
        }
        thread::sleep(wait);
        wait = (wait * 2).min(WAIT.1);
    }
}

/// Serves a connection to its end, and returns whether the daemon had welcomed it. `kept` holds the copy of a
/// userfaultfd that the daemon has asked for.
fn serve(socket: &Socket, views: &mut Result<Views, String>, kept: &mut Option<OwnedFd>) -> bool {
    let mut welcomed = false;
    let mut buffer = [0; wire::MAX_PACKET_BYTES];
    if socket.send(&wire::shim()).is_err() {
        return false;
    }
    // The end of the connection is an empty packet, which is no message.
    while let Ok((packet, device)) = socket.receive(&mut buffer) {
        let sent = match FromDaemon::read(packet) {
            Some(FromDaemon::Welcome) => {
                welcomed = true;
                continue;
            }
            Some(FromDaemon::OpenUserfault { id, keep }) if welcomed => {
                match open(device, views) {
                    Ok(handles) => {
                        // Before the daemon can register anything: memory has one userfaultfd at a time.
                        *kept = None;
                        let sent = socket.send_with(&wire::done(id), &handles);
                        let [userfault, ..] = handles;
                        if keep && sent.is_ok() {
                            *kept = Some(userfault);
                        }
                        sent
                    }
                    Err(reason) => socket.send(&wire::failed(id, &reason)),
                }
            }
            Some(FromDaemon::KeptUserfault { id }) if welcomed => match again(kept.as_ref(), views) {
                Ok(handles) => socket.send_with(&wire::done(id), &handles),
                Err(reason) => socket.send(&wire::failed(id, &reason)),
            },
            Some(FromDaemon::MappedFile { id, address }) if welcomed => {
                match views_now(views).and_then(|views| mapped::file(address, views.maps)) {
                    Ok(file) => socket.send_with(&wire::done(id), &[file]),
                    Err(reason) => socket.send(&wire::failed(id, &reason)),
                }
            }
            Some(FromDaemon::Unknown { id }) if welcomed => {
                socket.send(&wire::failed(id, "the shim knows nothing of that"))
            }
            _ => break,
        };
        if sent.is_err() {
            break;
        }
    }
    welcomed
}

/// The page tables of this process as the kernel shows them.
struct Views {
    /// This is `/proc/self/pagemap`.
    pagemap: File,
    /// This is `/proc/self/maps`.
    maps: File,
}

impl Views {
    fn open() -> Result<Self, String> {
        let file = |path| File::open(path).map_err(|error| format!("opening {path}: {error}"));
        Ok(Self { pagemap: file("/proc/self/pagemap")?, maps: file("/proc/self/maps")? })
    }
}

/// Returns three descriptors: a userfaultfd of this process, made with the daemon's `/dev/userfaultfd` if the daemon lent
/// it; the process's `pagemap`; and its `maps`.
fn open(device: Option<OwnedFd>, views: &mut Result<Views, String>) -> Result<[OwnedFd; 3], String> {
    let userfault = match &device {
        Some(device) => sys::userfaultfd_of(device.as_fd()),
        None => sys::userfaultfd(),
    };
    with_views(userfault.map_err(|error| format!("making a userfaultfd: {error}"))?, views)
}

/// Returns the same three descriptors with the userfaultfd of which a copy is kept.
fn again(kept: Option<&OwnedFd>, views: &mut Result<Views, String>) -> Result<[OwnedFd; 3], String> {
    let kept = kept.ok_or("no userfaultfd is kept")?;
    with_views(kept.try_clone().map_err(|error| format!("copying a userfaultfd: {error}"))?, views)
}

/// Adds the process's `pagemap` and `maps` to a userfaultfd.
fn with_views(userfault: OwnedFd, views: &mut Result<Views, String>) -> Result<[OwnedFd; 3], String> {
    let Views { pagemap, maps } = views_now(views)?;
    Ok([userfault, pagemap.into(), maps.into()])
}

/// Opens the page tables anew, or returns copies of what was opened when the process could do so still.
fn views_now(views: &mut Result<Views, String>) -> Result<Views, String> {
    if views.is_err() {
        // There may have been no descriptor to spare.
        *views = Views::open();
    }
    let kept = views.as_mut().map_err(|error| error.clone())?;
    let failed = |error: std::io::Error| format!("copying what shows the page tables: {error}");
    if let Ok(fresh) = Views::open() {
        return Ok(fresh);
    }
    // An earlier daemon has read it to its end.
    kept.maps.rewind().map_err(failed)?;
    let pagemap = kept.pagemap.try_clone().map_err(failed)?;
    Ok(Views { pagemap, maps: kept.maps.try_clone().map_err(failed)? })
}
