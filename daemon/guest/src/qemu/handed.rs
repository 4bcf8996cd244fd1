//! A QEMU runs as a user who may open nothing of the daemon's: what it needs is opened here, and handed to it.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use memlane_protocol::wire::starter::FIRST_DESCRIPTOR;
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};

use super::QemuError;
use super::definition::{DefinedNic, Definition, Given};
use super::state_directory::{Paths, log_of};

/// What is opened for a QEMU.
pub(super) struct Handed {
    log: File,
    memory: File,
    monitor: OwnedFd,
    taps: Vec<OwnedFd>,
}

impl Handed {
    /// Makes a guest's files in place of those that an earlier QEMU of this name has left, and opens its taps.
    ///
    /// # Errors
    ///
    /// Fails if a directory is not the daemon's own, if a file cannot be made, or if a tap cannot be opened.
    pub(super) fn open(definition: &Definition, paths: &Paths) -> Result<Self, QemuError> {
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| QemuError::Start { doing, path, source }
        };
        let taps = definition.nics.iter().map(|nic| open_tap(definition, nic)).collect::<Result<_, _>>()?;
        for path in [&paths.memory, &paths.qmp] {
            let directory = path.parent().expect("a file in a directory");
            own_directory(directory).map_err(failed("use the directory", directory))?;
        }
        memlane_net::unix_socket::make_way(&paths.qmp).map_err(failed("use the socket", &paths.qmp))?;
        let log = log_of(&paths.qmp);
        Ok(Self {
            taps,
            memory: memory_file(&paths.memory).map_err(failed("make the memory", &paths.memory))?,
            monitor: monitor(&paths.qmp).map_err(failed("make the socket", &paths.qmp))?,
            log: log_file(&log).map_err(failed("write to", &log))?,
        })
    }

    /// Returns the descriptors in the order in which they are handed down.
    pub(super) fn all(&self) -> Vec<BorrowedFd<'_>> {
        let files = [self.log.as_fd(), self.memory.as_fd(), self.monitor.as_fd()];
        files.into_iter().chain(self.taps.iter().map(AsFd::as_fd)).collect()
    }

    /// Returns how QEMU's arguments name them.
    pub(super) fn given(&self) -> Given {
        let log = FIRST_DESCRIPTOR as RawFd;
        let (memory, monitor, first_tap) = (log + 1, log + 2, log + 3);
        Given::by_descriptor(memory, monitor, (first_tap..).take(self.taps.len()))
    }
}

/// Makes a directory, in which nobody but the daemon's user can reach anything, if it is not there.
fn own_directory(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    // In a folder like /tmp others may have made one of this name before.
    let metadata = std::fs::symlink_metadata(directory)?;
    if metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o077 == 0 {
        return Ok(());
    }
    Err(io::Error::other(
        "others can reach into it; give it to the daemon's user with mode 0700, or name another in [guests] of the \
         configuration",
    ))
}

/// Makes the file of a guest's RAM.
///
/// QEMU opens it once more by its descriptor, for which the kernel looks at the mode of the file and at nothing else: so
/// the file is open to all, in a directory that is closed. Nobody gets at it who was not handed a descriptor.
fn memory_file(path: &Path) -> io::Result<File> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o606))?;
    Ok(file)
}

/// Makes the socket of the monitor. QEMU listens at it, and not the daemon: so the kernel tells of a connection that
/// QEMU's process is at the other end.
pub(super) fn monitor(path: &Path) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    Ok(socket.into())
}

fn log_file(log: &Path) -> io::Result<File> {
    // Appended to: QEMU's output and that of a script around it do not overwrite each other.
    let _ = std::fs::remove_file(log);
    OpenOptions::new().append(true).create_new(true).mode(0o600).open(log)
}

fn open_tap(definition: &Definition, nic: &DefinedNic) -> Result<OwnedFd, QemuError> {
    let (guest, network, tap) = (definition.name.clone(), nic.network.clone(), nic.tap.clone());
    // The kernel would make it, but nobody would have joined it to its bridge.
    if !Path::new("/sys/class/net").join(&tap).exists() {
        return Err(QemuError::NoTap { tap, guest, network });
    }
    tap_of(&tap).map_err(|source| {
        let remedy = match Errno::from_io_error(&source) {
            Some(Errno::PERM) => {
                let user = rustix::process::geteuid().as_raw();
                format!(
                    "; make it with `ip tuntap add {tap} mode tap user {user}`, so that it is the daemon's"
                )
            }
            Some(Errno::ACCESS) => {
                "; let the daemon's user read and write /dev/net/tun, which udev lets everyone do, and see DeviceAllow= \
                 of its unit"
                    .to_owned()
            }
            Some(Errno::BUSY) => "; another program has it, perhaps another guest".to_owned(),
            Some(Errno::NOENT | Errno::NODEV) => "; is there a /dev/net/tun (modprobe tun)?".to_owned(),
            _ => String::new(),
        };
        QemuError::Tap { tap, guest, source, remedy }
    })
}

/// Opens a tap as QEMU does.
pub(super) fn tap_of(name: &str) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open(c"/dev/net/tun", flags, Mode::empty())?;
    // SAFETY: a request of zeros is a valid one to fill in.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::NAMETOOLONG.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request is one for this ioctl, and outlives it.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_files_are_reached_by_their_descriptors_alone() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("new/memory");
        own_directory(&directory).unwrap();
        assert_eq!(directory.metadata().unwrap().mode() & 0o777, 0o700);
        let path = directory.join("web1.ram");
        std::fs::write(&path, "of an earlier guest").unwrap();
        let file = memory_file(&path).unwrap();
        let made = file.metadata().unwrap();
        assert_eq!((made.len(), made.mode() & 0o777), (0, 0o606));
        for mode in [0o755, 0o710, 0o701, 0o777] {
            std::fs::set_permissions(&directory, Permissions::from_mode(mode)).unwrap();
            let told = own_directory(&directory).unwrap_err().to_string();
            assert!(told.contains("mode 0700") && told.contains("[guests]"), "{told}");
        }
    }

    #[test]
    fn nobody_listens_at_a_monitor_before_qemu_does() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("qmp.sock");
        let _monitor = monitor(&path).unwrap();
        let refused = std::os::unix::net::UnixStream::connect(&path).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
}
