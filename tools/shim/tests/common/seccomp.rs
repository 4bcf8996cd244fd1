//! Programs that are forbidden some system calls, as by QEMU's `-sandbox` or systemd's
//! `SystemCallFilter=`.

use std::io::{Error, Result};
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{sock_filter, sock_fprog};

/// Lets `calls` fail with `EPERM` in the program that `command` starts.
pub(crate) fn forbid(command: &mut Command, calls: &[i64]) {
    let step = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
    let answer = |what| step(libc::BPF_RET | libc::BPF_K, 0, 0, what);
    // The number of the call comes first in what a filter sees (`struct seccomp_data`).
    let mut filter = vec![step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
    for call in calls {
        filter.push(step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, *call as u32));
        filter.push(answer(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32));
    }
    filter.push(answer(libc::SECCOMP_RET_ALLOW));
    // SAFETY: between fork and exec only system calls are made, on memory that was prepared.
    unsafe { command.pre_exec(move || install(&mut filter)) };
}

fn install(filter: &mut [sock_filter]) -> Result<()> {
    let program = sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program points to as many steps as it says. It binds this process alone.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
    };
    if done { Ok(()) } else { Err(Error::last_os_error()) }
}
