//! Daemons in other circumstances than the rig's.

use std::os::unix::net::UnixStream;
use std::path::Path;

use memlane_lab::{HostId, LabProcess, wait_for};

use crate::common::{LONG, Stage};

/// The daemon that all tests run.
pub(crate) const MEMLANED: &str = env!("CARGO_BIN_EXE_memlaned");

/// Starts `memlaned` in place of the rig's daemon of a host, through `by`: a program that changes something about
/// itself and then runs what follows among its arguments. It ends when the returned guard is dropped.
pub(crate) fn start_by(stage: &mut Stage, id: HostId, by: &[&str], memlaned: &Path) -> LabProcess {
    stage.rig.stop_daemon(id).unwrap();
    let mut command = stage.rig.lab().host(id).command(by[0]);
    command.args(&by[1..]).arg(memlaned).arg("--config").arg(stage.rig.config_file(id));
    let mut daemon = stage.rig.lab().host(id).spawn("memlaned-other", command).unwrap();
    let socket = stage.rig.api_socket(id);
    let up = wait_for("the daemon", LONG, || {
        (!daemon.is_running() || UnixStream::connect(&socket).is_ok()).then_some(())
    });
    up.unwrap();
    assert!(daemon.is_running(), "memlaned has ended: {}", daemon.log_tail());
    daemon
}

/// Starts the daemon of a host where `path` is what `other` is elsewhere. Every program of a lab has a mount
/// namespace of its own, so nobody else sees that but what this daemon starts.
pub(crate) fn start_where(stage: &mut Stage, id: HostId, path: &Path, other: &Path) -> LabProcess {
    let (path, other) = (path.to_str().unwrap(), other.to_str().unwrap());
    let script = r#"mount --bind "$1" "$2" && shift 2 && exec "$@""#;
    start_by(stage, id, &["sh", "-c", script, "sh", other, path], Path::new(MEMLANED))
}
