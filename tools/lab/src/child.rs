//! Programs that this process starts, and what becomes of them when it ends.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{LazyLock, mpsc};

use rustix::io::Errno;
use rustix::process::{Pid, Signal};

/// The largest number of bytes that [`tail`] returns.
const LOG_TAIL_BYTES: u64 = 4096;

/// Makes `command` die with the thread that starts it, so that nothing survives a crash.
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor takes locks.
    // (`Errno` converts to `io::Error` without allocating.)
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the line above.
            if rustix::process::getppid() == Some(parent) { Ok(()) } else { Err(Errno::OWNERDEAD.into()) }
        });
    }
}

/// Kills every program that has `directory` among its arguments. What a daemon starts outlives it, and a service
/// manager may even have put it outside of the lab's namespaces.
pub(crate) fn kill_all_naming(directory: &Path) {
    let own = rustix::process::getpid();
    let needle = directory.as_os_str().as_encoded_bytes();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| Pid::from_raw(name.parse().ok()?));
        let Some(pid) = pid.filter(|pid| *pid != own) else { continue };
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if arguments.windows(needle.len()).any(|window| window == needle) {
            // Fails only if it has ended meanwhile.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

/// Starts a program from a thread that lives as long as this process. `PR_SET_PDEATHSIG` depends on the thread that
/// forked, so a thread that may end earlier must not start a program.
pub(crate) fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    type Order = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: LazyLock<mpsc::Sender<Order>> = LazyLock::new(|| {
        let (sender, orders) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in orders {
                // The one who ordered waits for the reply.
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });

    let (reply, answer) = mpsc::channel();
    SPAWNER.send((command, reply)).expect("the spawner runs as long as this process");
    answer.recv().expect("the spawner answers every order")
}

/// Returns the last whole lines of a log, 4 KiB at most.
pub(crate) fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(LOG_TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let whole_lines = match text.split_once('\n') {
        Some((_, rest)) if start > 0 => rest,
        _ => &text,
    };
    Ok(whole_lines.trim_end().to_owned())
}
