//! What systemd does for `memlane-guest.socket`.

use std::fs::{self, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use memlane_lab::{HostId, Programs};

use super::Stage;

/// Listens where a host's daemon looks for a starter, and starts one for each connection (`Accept=yes`), with the connection as
/// its standard input. Guests run as `users`.
pub(crate) fn activate(stage: &Stage, id: HostId, users: &str) {
    let host = stage.rig.lab().host(id);
    let path = host.directory().join("starter.sock");
    let listener = UnixListener::bind(&path).unwrap();
    // The daemon's user has the directory.
    let owner = fs::metadata(host.directory()).unwrap().uid();
    chown(&path, Some(owner), None).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    let programs = Programs::build(false).unwrap();
    let (namespace, qemu, users) = (host.namespace().to_owned(), host.qemu(), users.to_owned());
    // It ends with this process; what it has started ends with the host.
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut starter = Command::new("ip");
            starter.args(["netns", "exec", &namespace]).arg(programs.path("memlane-starter"));
            starter.args(["--users", &users]).arg("--shim").arg(programs.shim()).arg("--qemu").arg(&qemu);
            let connection = OwnedFd::from(connection.unwrap());
            let mut started = starter.stdin(Stdio::from(connection)).spawn().unwrap();
            std::thread::spawn(move || started.wait());
        }
    });
}
