//! `/init` of a Linux guest that is migrated: it writes and checks its memory all the time, and reports the result to a
//! client over TCP.
//!
//! It is linked statically and is the only program in its initramfs. What it shall do stands on the kernel's
//! command line: see [`options`].

mod boot;
mod check;
mod counters;
mod disk;
mod memory;
mod options;
mod pattern;
mod service;

use std::convert::Infallible;
use std::process::ExitCode;
use std::sync::Arc;

use check::Checkers;
use options::BootOptions;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("memlane-init: this is the first program of a guest (/init), not one for a host");
        return ExitCode::FAILURE;
    }
    let Err(error) = run();
    println!("memlane-init: {error}");
    // Process 1 must not end: the kernel would panic, boot again, and so on for ever.
    boot::power_off()
}

fn run() -> Result<Infallible, String> {
    boot::mount()?;
    let options = BootOptions::read()?;
    boot::load_modules()?;
    boot::bring_up(options.address, options.prefix)?;
    let checkers = Arc::new(Checkers::start(&options)?);
    let boot_id = boot::boot_id()?;
    println!("memlane-init: ready at {}, boot {boot_id}", options.address);
    service::serve(checkers, boot_id)
}
