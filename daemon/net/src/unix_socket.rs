//! This module deals with Unix sockets in the file system.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use socket2::{Domain, SockAddr, Socket, Type};

/// The process at the other end of a connection, as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// This is the number of the process that connected, or that listens; 0 means that it is in another pid namespace.
    pub pid: u32,
    /// This is the user id of the process at that time.
    pub uid: u32,
}

/// Asks the kernel (`SO_PEERCRED`) which process is at the other end.
///
/// # Errors
///
/// Fails if the socket is of another kind.
pub fn peer(socket: impl AsFd) -> io::Result<Peer> {
    let found = credentials(&socket)?;
    Ok(Peer { pid: found.pid.try_into().unwrap_or(0), uid: found.uid })
}

/// Returns what the kernel knows of the process at the other end. (The function of rustix has a type for the process's
/// number that cannot be 0.)
fn credentials(socket: &impl AsFd) -> io::Result<libc::ucred> {
    let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the descriptor is open while it is borrowed, and the kernel writes at most `length` bytes, which
    // are those of `found`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut length,
        )
    };
    match done {
        0 => Ok(found),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Asks the kernel for the groups of the process at the other end when it connected: its own, which decides what files it
/// makes (`SO_PEERCRED`), and the others that it is in (`SO_PEERGROUPS`). No list of users and groups is consulted, so
/// a process that was started before its user joined a group is not in that group.
///
/// # Errors
///
/// Fails if the socket is of another kind.
pub fn groups_of_peer(socket: impl AsFd) -> io::Result<Vec<u32>> {
    let own = credentials(&socket)?.gid;
    let mut groups: Vec<libc::gid_t> = Vec::new();
    loop {
        let mut length = size_of_val(groups.as_slice()) as libc::socklen_t;
        // SAFETY: the descriptor is open while it is borrowed, and the kernel writes at most `length` bytes, which
        // are those of `groups`.
        let done = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let found = length as usize / size_of::<libc::gid_t>();
        match done {
            0 => {
                groups.truncate(found);
                groups.push(own);
                return Ok(groups);
            }
            // There are more, and the kernel has said how many. They never change, so that this happens once.
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ERANGE) && found > groups.len() => {
                    groups.resize(found, 0);
                }
                error => return Err(error),
            },
        }
    }
}

/// The option that returns the supplementary groups of a peer (`asm-generic/socket.h`, Linux 4.13).
const SO_PEERGROUPS: libc::c_int = 59;

/// Makes the directory of a socket, and removes a socket that no process listens on any more.
///
/// # Errors
///
/// Fails if a process listens there, if the path is anything else than a socket, or if the directory cannot be made.
pub fn make_way(path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let kind = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !kind.is_socket() {
        return Err(io::Error::other("what is there is no socket; remove it, or configure another path"));
    }
    if !is_dead(path)? {
        return Err(io::Error::other("another daemon listens there; stop it, or configure another path"));
    }
    std::fs::remove_file(path)
}

/// Tells whether no process listens at a socket. A process that has not accepted connections for long listens all the
/// same, and is not waited for.
fn is_dead(path: &Path) -> io::Result<bool> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // EPROTOTYPE: a process listens, for another kind of socket. EAGAIN: so many wait that there is no room for more.
    let connected = socket.connect(&SockAddr::unix(path)?);
    Ok(connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_kernel_knows_who_connects() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        assert_eq!(peer(&ours).unwrap(), Peer { pid: std::process::id(), uid });
        assert!(peer(std::fs::File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn the_kernel_knows_the_groups_of_who_connects() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let listed = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap();
        let mut expected: Vec<u32> = listed.split_whitespace().map(|group| group.parse().unwrap()).collect();
        expected.push(rustix::process::getegid().as_raw());
        assert_eq!(groups_of_peer(&ours).unwrap(), expected);
        assert!(groups_of_peer(std::fs::File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn only_dead_sockets_make_way() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/socket");
        make_way(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert!(make_way(&path).unwrap_err().to_string().contains("another daemon"));
        drop(listener);
        make_way(&path).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(make_way(&path).unwrap_err().to_string().contains("is no socket"));
        assert!(path.exists());
    }

    #[test]
    fn whoever_accepts_nobody_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(0).unwrap();
        // All that may wait, so that a connection that waits for room would wait for ever.
        let _waiting = UnixStream::connect(&path).unwrap();
        let (sender, told) = mpsc::channel();
        std::thread::spawn(move || sender.send(make_way(&path)));
        let told = told.recv_timeout(Duration::from_secs(20)).expect("nothing is waited for");
        assert!(told.unwrap_err().to_string().contains("another daemon"));
    }
}
