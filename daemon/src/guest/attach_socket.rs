//! Where VMMs attach their guests, and shims make themselves known.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use memlane_kvm::packet;
use memlane_kvm::ram::GuestRam;
use memlane_protocol::wire::attach::{FromVmm, Hello, MAX_PACKET_BYTES, Standing, ToVmm, VERSIONS};
use memlane_protocol::wire::hello::common_version;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::unix::AsyncFd;
use tracing::{info, warn};

use super::attached::{receive, send};
use super::{Attached, Guest, Process, shim};
use crate::host::Host;
use crate::task;
use crate::unix_socket::{Peer, peer};

/// Longest time that a VMM may take to introduce itself.
const GREETING: Duration = Duration::from_secs(5);
/// VMMs that may be introducing themselves at once.
const GREETING_AT_ONCE: usize = 32;

/// Makes the socket, in place of one that a daemon before this one left behind.
pub fn bind(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    crate::unix_socket::make_way(path)?;
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(64)?;
    // Who may attach is decided by the user id of whoever connects.
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    watch(socket.into())
}

fn watch(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by the value, and never replaced or closed under it.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

/// Takes in VMMs for as long as the daemon runs.
pub async fn serve(listener: AsyncFd<OwnedFd>, host: Rc<Host>) {
    let greeting = Arc::new(tokio::sync::Semaphore::new(GREETING_AT_ONCE));
    loop {
        let permit = greeting.clone().acquire_owned().await.expect("the semaphore is never closed");
        match accept(&listener).await {
            Ok(socket) => {
                let host = host.clone();
                task::spawn("attaching VMM", async move {
                    if let Err(error) = greet(socket, &host).await {
                        warn!(error, "a VMM or a shim could not attach");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a VMM's connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<OwnedFd> {
    use rustix::net::{SocketFlags, accept_with};
    loop {
        let mut ready = listener.readable().await?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        if let Ok(result) = ready.try_io(|listener| Ok(accept_with(listener.get_ref(), flags)?)) {
            return result;
        }
    }
}

/// Who has connected, and the version that is spoken.
enum Introduced {
    Vmm(Box<Hello>, Arc<GuestRam>, Process, u16),
    Shim(u16),
}

async fn greet(socket: OwnedFd, host: &Rc<Host>) -> Result<(), String> {
    let broken = |error: io::Error| format!("its connection broke: {error}");
    let Peer { pid, uid } = peer(&socket).map_err(broken)?;
    let process = Process::running(pid);
    let socket = watch(socket).map_err(broken)?;
    let introduced = async {
        if !host.config.attach_users.contains(&uid) {
            return Err(format!("user {uid} may not attach guests; see attach_users in the configuration"));
        }
        // A VMM of which it cannot be told whether it lives is none to leave a guest with.
        let process = process.map_err(|error| error.to_string())?;
        let (packet, descriptors) =
            receive(&socket).await.map_err(broken)?.ok_or("it hung up without a word")?;
        match FromVmm::decode(&packet) {
            Ok(FromVmm::Hello(hello)) => introduce(hello, descriptors, host, process).await,
            Ok(FromVmm::Shim { oldest, newest }) => {
                let version = agree("shim", (oldest, newest))?;
                host.shims.has_room(pid).then_some(Introduced::Shim(version)).ok_or_else(|| {
                    format!("{} shims are connected already, which is all that there may be", shim::MOST)
                })
            }
            Ok(FromVmm::Reply(_)) => Err("it began with a reply instead of a hello".into()),
            Err(error) => Err(format!("its hello is not understood: {error}")),
        }
    };
    let introduced = tokio::time::timeout(GREETING, introduced).await;
    let introduced = match introduced.unwrap_or_else(|_| Err("it did not say who it is".into())) {
        Ok(introduced) => introduced,
        Err(reason) => {
            let _ = send(&socket, &ToVmm::Refused { reason: reason.clone() }.encode(), &[]).await;
            // A greeting left unread would reset the connection, and hide the reason behind that.
            let _ = packet::recv(socket.get_ref(), &mut vec![0; MAX_PACKET_BYTES]);
            return Err(format!("process {pid}: {reason}"));
        }
    };
    let (Introduced::Vmm(.., version) | Introduced::Shim(version)) = introduced;
    let welcomed = send(&socket, &ToVmm::Welcome { version }.encode(), &[]).await;
    let Introduced::Vmm(hello, ram, process, _) = introduced else {
        // Children of VMMs have one too, and come and go: one that is gone already is no news.
        if welcomed.is_ok() {
            host.shims.add(pid, socket);
        }
        return Ok(());
    };
    welcomed.map_err(broken)?;
    let Hello { standing, migration, shape, .. } = *hello;
    info!(guest = %shape.name, vmm = %shape.machine.vmm, pid, ?standing, "a VMM attached");
    if !ram.is_sealed() {
        warn!(guest = %shape.name, "its memory is a file that cannot be sealed; a VMM that cuts it ends this daemon");
    }
    let migration = matches!(standing, Standing::Relinquished | Standing::Loaded).then_some(migration);
    let driver = Rc::new(Attached::new(socket, Some(ram.clone())));
    let guest = Rc::new(Guest::new(shape, ram, driver, Rc::new(process), standing));
    guest.migration.replace(migration);
    host.guest_attached(guest);
    Ok(())
}

/// Checks everything that a VMM said, and maps its guest's memory.
async fn introduce(
    hello: Hello,
    descriptors: Vec<OwnedFd>,
    host: &Host,
    process: Process,
) -> Result<Introduced, String> {
    let version = agree("VMM", (hello.oldest, hello.newest))?;
    let name = &hello.shape.name;
    if host.guest(name).is_some() {
        return Err(format!("a guest named {name} is attached already; give each its own name"));
    }
    let (expected, found) = (hello.shape.regions.len(), descriptors.len());
    if expected != found {
        return Err(format!("guest {name} has {expected} memory regions, and {found} descriptors came"));
    }
    let regions = hello.shape.regions.iter().copied().zip(descriptors).collect();
    let ram = task::aside(move || GuestRam::map(regions).inspect(GuestRam::look_on)).await;
    let ram = ram.map_err(|error| format!("memory of guest {name}: {error}"))?;
    Ok(Introduced::Vmm(Box::new(hello), Arc::new(ram), process, version))
}

fn agree(who: &str, theirs: (u16, u16)) -> Result<u16, String> {
    common_version(VERSIONS, theirs).ok_or_else(|| {
        format!(
            "the daemon speaks versions {} to {} of the attach protocol and the {who} speaks {} to {}; \
             upgrade the older one",
            VERSIONS.0, VERSIONS.1, theirs.0, theirs.1
        )
    })
}
