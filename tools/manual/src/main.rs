//! `memlane-manual DIRECTORY` writes the man pages and the shells' completions of all programs into a directory, from
//! the same definitions that the programs read their arguments with.

#![forbid(unsafe_code)]

mod qemu;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use memlane_vmm::flags::Flags;
use memlaned::arguments::Arguments;

/// The shells that `memlanectl` is completed in.
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

fn main() -> ExitCode {
    let Some(directory) = env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: memlane-manual DIRECTORY");
        return ExitCode::from(2);
    };
    match write(&directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("memlane-manual: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn write(directory: &Path) -> Result<()> {
    let man = directory.join("man");
    let completions = directory.join("completions");
    for directory in [&man, &completions] {
        fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    }
    page(Arguments::command().name("memlaned"), "8", &man)?;
    page(Flags::command().name("memlane-vmm"), "1", &man)?;
    page(qemu::command(), "1", &man)?;
    // What help says of itself is no news in a manual.
    let mut ctl = memlanectl::command().disable_help_subcommand(true);
    // Gives subcommands their whole names.
    ctl.build();
    pages(&ctl, &man)?;
    for shell in SHELLS {
        generate_to(shell, &mut memlanectl::command(), "memlanectl", &completions)
            .with_context(|| format!("writing the completions for {shell}"))?;
    }
    Ok(())
}

/// Writes the page of a command, and one for each of its subcommands: `memlanectl-keys-issue.1` is about
/// `memlanectl keys issue`.
fn pages(command: &Command, directory: &Path) -> Result<()> {
    for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
        pages(subcommand, directory)?;
    }
    page(command.clone(), "1", directory)
}

fn page(command: Command, section: &str, directory: &Path) -> Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let file = directory.join(format!("{name}.{section}"));
    let mut text = Vec::new();
    Man::new(command.version(env!("CARGO_PKG_VERSION")))
        .section(section)
        .manual("Memlane")
        .render(&mut text)?;
    fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_and_order_has_a_page() {
        let directory = tempfile::tempdir().expect("a directory");
        write(directory.path()).expect("a manual");
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).expect(name);
        for page in
            ["memlaned.8", "memlane-vmm.1", "memlane-qemu.1", "memlanectl.1", "memlanectl-keys-issue.1"]
        {
            assert!(read(&format!("man/{page}")).contains(".SH NAME"), "{page}");
        }
        assert!(read("man/memlanectl-migrate.1").contains("downtime\\-limit"));
        assert!(read("man/memlanectl-migrate.1").contains("memlanectl migrate"));
        for completion in ["memlanectl.bash", "_memlanectl", "memlanectl.fish"] {
            assert!(read(&format!("completions/{completion}")).contains("migrate"), "{completion}");
        }
    }
}
