//! The cargo that runs this program.

use std::process::Command;

/// Returns a command of that cargo, still without arguments.
pub(crate) fn command() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Returns a command as [`command`] does, for which a warning of rustdoc is an error.
pub(crate) fn strict() -> Command {
    let mut command = command();
    command.env("RUSTDOCFLAGS", "-D warnings");
    command
}
