//! This process becomes the QEMU of a guest.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use memlane_protocol::wire::starter::{FIRST_DESCRIPTOR, StartRequest};
use rustix::fs::Mode;
use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::process::{Gid, Uid, setsid, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use crate::StartError;
use crate::connection::ABOVE;
use crate::options::Options;

/// QEMU needs none of it, but a wrapper may be a script.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs QEMU in the place of this program. It returns only if that fails.
///
/// # Errors
///
/// Fails if the kernel refuses something.
pub(crate) fn run(
    request: StartRequest,
    descriptors: Vec<OwnedFd>,
    options: &Options,
) -> Result<Infallible, StartError> {
    let user = request.user;
    let failed = |doing| move |source: io::Error| StartError::Become { doing, user, source };
    hand_down(descriptors).map_err(failed("hand descriptors down"))?;
    // A daemon is the last that the kernel ends for want of memory, and what it starts inherits that; guests are not.
    fs::write("/proc/self/oom_score_adj", "0").map_err(failed("set the score for want of memory"))?;
    drop_rights(user, &request.groups).map_err(failed("give up all rights"))?;
    umask(Mode::from_raw_mode(0o077));
    match setsid() {
        // A service of systemd leads a session already.
        Ok(_) | Err(Errno::PERM) => {}
        Err(error) => return Err(failed("begin a session")(error.into())),
    }
    let mut qemu = Command::new(OsStr::from_bytes(&request.program));
    qemu.args(request.arguments.into_iter().map(OsString::from_vec)).current_dir("/");
    // Nothing of this program's own environment, which may tell of the host and of the daemon.
    qemu.env_clear().env("PATH", PATH).env("LD_PRELOAD", &options.shim);
    qemu.env("MEMLANE_ATTACH_SOCKET", PathBuf::from(OsString::from_vec(request.attach_socket)));
    Err(failed("start QEMU")(qemu.exec()))
}

/// Gives the descriptors the numbers that QEMU's arguments name. All others close when QEMU starts.
fn hand_down(descriptors: Vec<OwnedFd>) -> io::Result<()> {
    // First out of the way: those that came have any numbers.
    let above = descriptors.iter().map(|descriptor| fcntl_dupfd_cloexec(descriptor, ABOVE));
    let above = above.collect::<Result<Vec<_>, _>>()?;
    drop(descriptors);
    for (number, descriptor) in (FIRST_DESCRIPTOR as i32..).zip(&above) {
        let placed = fcntl_dupfd_cloexec(descriptor, number)?;
        if placed.as_raw_fd() != number {
            return Err(io::Error::other(format!(
                "descriptor {number} is in use; nobody should have opened it"
            )));
        }
        fcntl_setfd(&placed, FdFlags::empty())?;
        // It is QEMU's from now on.
        let _ = placed.into_raw_fd();
    }
    let log = above.first().ok_or(Errno::BADF)?;
    rustix::stdio::dup2_stdout(log)?;
    rustix::stdio::dup2_stderr(log)?;
    Ok(())
}

/// Makes this process one of the guest's user, without any capability, for good. It has one thread only, for which
/// these calls are.
fn drop_rights(user: u32, groups: &[u32]) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    let groups: Vec<Gid> = groups.iter().map(|group| Gid::from_raw(*group)).collect();
    set_thread_groups(&groups)?;
    set_thread_res_gid(gid, gid, gid)?;
    // The kernel takes the capabilities away with it, but those that may be inherited by a program.
    set_thread_res_uid(uid, uid, uid)?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    // No program that QEMU runs gains rights, whatever its file says.
    set_no_new_privs(true)?;
    if rustix::process::getuid() == uid && rustix::process::geteuid() == uid {
        return Ok(());
    }
    Err(io::Error::other("the kernel did not change the user"))
}
