//! `memlane-qemu` stands in front of QEMU where a manager of guests starts it, and becomes that QEMU. libvirt names it
//! as `<emulator>`; elsewhere it is linked in the place of QEMU's own program.
//!
//! It adds to the command line what Memlane needs to move the guest: RAM in shared files, the shim, and a monitor.
//! Whatever it cannot do, the guest starts, and a line on standard error says what keeps it from being moved. What only
//! asks about QEMU (`-version`, `-machine none`, `-device help`, `-S` without a name) is started as it is.
//!
//! All arguments are QEMU's, so this program's own settings are environment variables:
//!
//! - `MEMLANE_EMULATOR` is the path of the QEMU to start. Without it that is the program in whose place this one
//!   stands (its name with `.distrib` behind it), or else the QEMU of the host.
//! - `MEMLANE_SHIM` is the path of the shim, `/usr/lib/memlane/libmemlane_shim.so` without it.
//! - `MEMLANE_ATTACH_SOCKET` is where the shim finds the daemon, `/run/memlane/attach.sock` without it.
//! - `MEMLANE_RAM` is the directory of ordinary RAM, `/dev/shm` without it: a tmpfs, or a hugetlbfs.
//! - `MEMLANE_MONITORS` is the directory of the monitors' sockets, `/run/memlane-qemu` without it.
//! - `MEMLANE_QEMU_SHOW=1` has it show what it would start, and start nothing: the program and its arguments, one on
//!   each line; then what it sets in the environment; and then the texts of the files that it would hand to QEMU in the
//!   place of others. There `fd=N` stands for the socket of the monitor, whose path is named by a line.

#![forbid(unsafe_code)]

mod backend;
mod config_file;
mod emulator;
mod host;
mod line;
mod monitor;
mod probe;
mod rewrite;
mod settings;
mod size;
mod start;
mod warning;

use std::env;
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use emulator::Emulator;
use host::Host;
use start::Start;

/// The environment variable that says that nothing is to be started.
const SHOW: &str = "MEMLANE_QEMU_SHOW";

fn main() -> ExitCode {
    let mut arguments = env::args_os();
    let called = arguments.next().unwrap_or_default();
    let arguments: Vec<OsString> = arguments.collect();
    let emulator = match Emulator::find(&called) {
        Ok(emulator) => emulator,
        Err(error) => {
            tell(&error);
            return ExitCode::FAILURE;
        }
    };
    let mut start = Start::new(emulator, arguments);
    let shows = env::var_os(SHOW).is_some_and(|value| value == "1");
    if !probe::is_probe(&start.arguments) {
        let rewritten = rewrite::rewrite(&start.arguments, Host::look());
        start.take(rewritten);
        start.load_shim();
    }
    for warning in &start.warnings {
        tell(warning);
    }
    if shows {
        return start.show();
    }
    let error = start.run();
    tell(&error);
    ExitCode::FAILURE
}

/// Writes a line for a person.
fn tell(text: &dyn Display) {
    // A guest starts even where nobody reads this; eprintln!() would panic then.
    let _ = writeln!(io::stderr(), "memlane-qemu: {text}");
}
