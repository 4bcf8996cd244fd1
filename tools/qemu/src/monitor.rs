//! The monitor by which the daemon reaches a QEMU that a manager has started.

use std::fmt::Display;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use memlane_protocol::wire::Label;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with};

use crate::warning::Warning;

/// This is the name of the monitor's character device.
pub(crate) const ID: &str = "memlane-monitor";

/// The environment variable that names the directory of the monitors' sockets.
const DIRECTORY_VARIABLE: &str = "MEMLANE_MONITORS";
const DEFAULT_DIRECTORY: &str = "/run/memlane-qemu";
/// The daemon's group is that of the directory, which is setgid.
const MODE: u32 = 0o660;

/// Returns the path of the socket of a guest's monitor.
pub(crate) fn path(name: Option<&str>) -> PathBuf {
    let directory =
        std::env::var_os(DIRECTORY_VARIABLE).map_or_else(|| DEFAULT_DIRECTORY.into(), PathBuf::from);
    directory.join(file_name(name, std::process::id()))
}

/// Returns the name of the socket of a guest's monitor.
fn file_name(name: Option<&str>, process: u32) -> String {
    match name.and_then(|name| name.parse::<Label>().ok()) {
        Some(label) => format!("{label}.sock"),
        None => format!("qemu-{process}.sock"),
    }
}

/// Returns the arguments that have QEMU listen at a socket, which it is started with.
pub(crate) fn arguments(descriptor: impl Display) -> [String; 4] {
    let socket = format!("socket,id={ID},fd={descriptor},server=on,wait=off");
    ["-chardev".into(), socket, "-mon".into(), format!("chardev={ID},mode=control")]
}

/// Makes the socket of a monitor. QEMU listens at it, and not this program, so the kernel tells of a connection which
/// process is at the other end.
///
/// # Errors
///
/// Fails if another QEMU listens there, or if the socket cannot be made.
pub(crate) fn make(path: &Path) -> Result<OwnedFd, Warning> {
    let failed = |error: io::Error| {
        let directory = path.parent().unwrap_or(path).display();
        let what = format!("cannot make the monitor's socket {} ({error})", path.display());
        Warning::new(
            what,
            format!(
                "make {directory} a directory that QEMU's user can write to, or name one by {DIRECTORY_VARIABLE}"
            ),
        )
    };
    match is_in_use(path) {
        Ok(false) => {}
        Ok(true) => {
            let what = format!("another QEMU listens at {}", path.display());
            return Err(Warning::new(what, "give each guest of this host a name of its own (-name)"));
        }
        Err(error) => return Err(failed(error)),
    }
    let make = || {
        let socket = stream_socket(SocketFlags::CLOEXEC)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        fs::set_permissions(path, Permissions::from_mode(MODE))?;
        Ok(socket)
    };
    make().map_err(failed)
}

/// Tells whether somebody listens at a socket. One that an earlier QEMU has left is removed.
fn is_in_use(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {}
        Ok(_) => return Err(io::Error::other("something else is there")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    }
    // It does not wait for somebody who listens and is busy.
    let socket = stream_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map(|()| false),
        Err(error) => Err(error.into()),
    }
}

fn stream_socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_guest_that_has_no_label_is_named_by_its_process() {
        assert_eq!(file_name(Some("web1"), 7), "web1.sock");
        for name in [None, Some(""), Some("../web1"), Some("web 1"), Some(".web")] {
            assert_eq!(file_name(name, 7), "qemu-7.sock", "{name:?}");
        }
    }

    #[test]
    fn nobody_listens_before_qemu_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web1.sock");
        let socket = make(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o660);
        assert_eq!(UnixStream::connect(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        // As QEMU does it.
        rustix::net::listen(&socket, 1).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_socket_that_was_left_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web1.sock");
        drop(UnixListener::bind(&path).unwrap());
        make(&path).unwrap();
    }

    #[test]
    fn a_monitor_of_another_qemu_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web1.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let told = make(&path).unwrap_err().to_string();
        assert!(told.contains("another QEMU listens at") && told.contains("-name"), "{told}");
        UnixStream::connect(&path).unwrap();
        drop(listener);
    }

    #[test]
    fn what_is_no_directory_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let told = make(&directory.path().join("absent/web1.sock")).unwrap_err().to_string();
        assert!(told.contains("cannot be moved") && told.contains("MEMLANE_MONITORS"), "{told}");
        let file = directory.path().join("file.sock");
        fs::write(&file, "kept").unwrap();
        make(&file).unwrap_err();
        assert_eq!(fs::read_to_string(&file).unwrap(), "kept");
        let long = directory.path().join("x".repeat(120));
        make(&long).unwrap_err();
    }
}
