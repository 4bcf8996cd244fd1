//! QEMU, the shim that is loaded into it, and the program that starts it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{Finding, Host};
use crate::child;

/// Memlane's driver was written for QEMU from this version on.
const OLDEST: (u32, u32) = (7, 2);
/// A program may take this long to say its version.
const PATIENCE: Duration = Duration::from_secs(10);

/// Looks at QEMU.
pub(super) fn look(host: &Host<'_>) -> Vec<Finding> {
    let guests = &host.config.guests;
    if guests.qemu.is_empty() {
        return vec![Finding::ok("qemu", "the configuration lets no QEMU be started (guests.qemu is empty)")];
    }
    let mut findings: Vec<Finding> =
        guests.qemu.iter().map(|program| qemu(program, version_of(program, None))).collect();
    // Whatever QEMU is there loads the shim for a try. Any program does, where there is none.
    let there = guests.qemu.iter().find(|program| program.is_file());
    let loader = there.map_or(Path::new("/bin/true"), |program| program.as_path());
    let header = header(&guests.shim);
    let loaded = header.is_ok().then(|| version_of(loader, Some(&guests.shim)));
    findings.push(shim(&guests.shim, header, loaded));
    let mode = fs::metadata(&guests.starter).map(|found| found.mode());
    findings.push(starter(&guests.starter, mode.map_err(|error| error.to_string())));
    findings
}

/// What a program says of its version, and the complaints of its loader.
struct Said {
    version: String,
    complaint: String,
}

/// Runs a program that says its version, with a library loaded into it.
fn version_of(program: &Path, library: Option<&Path>) -> Result<Said, String> {
    let mut command = Command::new(program);
    command.arg("--version");
    if let Some(library) = library {
        command.env("LD_PRELOAD", library);
    }
    // A shim does nothing where it is told of no daemon.
    command.env_remove("MEMLANE_ATTACH_SOCKET");
    let ended = child::run(&mut command, PATIENCE).map_err(|error| error.to_string())?;
    match ended.success {
        true => Ok(Said { version: ended.stdout, complaint: ended.stderr.trim().to_owned() }),
        false => Err(ended.stderr.trim().to_owned()),
    }
}

fn qemu(program: &Path, said: Result<Said, String>) -> Finding {
    const CHECK: &str = "qemu";
    const INSTALL: &str = "apt install qemu-system-x86; where no QEMU is wanted: qemu = [] below [guests] in the \
                           daemon's configuration";
    let name = program.display();
    let text = match said {
        Ok(said) => said.version,
        Err(error) => return Finding::missing(CHECK, format!("{name} cannot be run: {error}"), INSTALL),
    };
    let first = text.lines().next().unwrap_or_default();
    match version(first) {
        None => Finding::missing(CHECK, format!("{name} is no QEMU; it says {first:?}"), INSTALL),
        Some(found) if found < OLDEST => {
            let found = format!("{name}: {}.{}, which is too old", found.0, found.1);
            Finding::missing(CHECK, found, "install QEMU 7.2 or newer, such as Debian 12 has")
        }
        Some((major, minor)) => Finding::ok(CHECK, format!("{name}: {major}.{minor}")),
    }
}

/// Finds the version in "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)".
fn version(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.split_once("QEMU emulator version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Judges the shim by the first bytes of its file, with its mode, and by what a program says that loads it.
fn shim(
    file: &Path,
    header: Result<([u8; 20], u32), String>,
    loaded: Option<Result<Said, String>>,
) -> Finding {
    const CHECK: &str = "shim";
    let install = format!(
        "install the package memlane again, or: install -D target/release/libmemlane_shim.so {}",
        file.display()
    );
    let name = file.display();
    let (header, mode) = match header {
        Ok(found) => found,
        Err(error) => return Finding::missing(CHECK, format!("{name} cannot be read: {error}"), install),
    };
    if !is_library(&header) {
        return Finding::missing(CHECK, format!("{name} is no library for x86-64"), install);
    }
    if mode & 0o004 == 0 {
        let found = format!("users of guests may not read {name} (mode {:04o})", mode & 0o7777);
        return Finding::missing(CHECK, found, format!("chmod 755 {name}"));
    }
    let complaint = match loaded {
        Some(Err(error)) => error,
        Some(Ok(said)) => said.complaint,
        None => String::new(),
    };
    // What else a program complains of is its own affair.
    let of_loader = complaint.lines().find(|line| line.contains("ld.so") || line.contains("GLIBC_"));
    match of_loader {
        Some(line) => {
            let remedy = "install the Memlane that was built for this version of Debian, or build it here";
            Finding::missing(CHECK, format!("{name} cannot be loaded: {line}"), remedy)
        }
        None => Finding::ok(CHECK, format!("{name} can be loaded")),
    }
}

/// Whether a file begins like a shared library for x86-64: elf(5).
fn is_library(header: &[u8; 20]) -> bool {
    const CLASS_64: u8 = 2;
    const SHARED: u8 = 3;
    const X86_64: u8 = 62;
    header.starts_with(b"\x7fELF") && header[4] == CLASS_64 && header[16] == SHARED && header[18] == X86_64
}

/// Reads the first bytes of a file, and its mode.
fn header(file: &Path) -> Result<([u8; 20], u32), String> {
    let read = || -> io::Result<([u8; 20], u32)> {
        let mut file = File::open(file)?;
        let mut header = [0; 20];
        file.read_exact(&mut header)?;
        Ok((header, file.metadata()?.mode()))
    };
    read().map_err(|error| error.to_string())
}

fn starter(file: &Path, mode: Result<u32, String>) -> Finding {
    const CHECK: &str = "starter";
    let name = file.display();
    let install =
        format!("install the package memlane again, or: install -D target/release/memlane-starter {name}");
    match mode {
        Err(error) => Finding::missing(CHECK, format!("{name} cannot be looked at: {error}"), install),
        Ok(mode) if mode & 0o111 == 0 => {
            Finding::missing(CHECK, format!("{name} is no program"), format!("chmod 755 {name}"))
        }
        Ok(_) => Finding::ok(CHECK, format!("{name} is there")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn said(version: &str, complaint: &str) -> Result<Said, String> {
        Ok(Said { version: version.to_owned(), complaint: complaint.to_owned() })
    }

    #[test]
    fn qemu_is_new_enough_or_not() {
        let judge = |text: &str| qemu("/usr/bin/qemu".as_ref(), said(text, "")).status;
        assert_eq!(
            judge("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright"),
            Status::Ok
        );
        assert_eq!(judge("QEMU emulator version 10.0.2"), Status::Ok);
        assert_eq!(judge("QEMU emulator version 7.1.0"), Status::Missing);
        assert_eq!(judge("true (GNU coreutils) 9.1"), Status::Missing);
        assert_eq!(judge("QEMU emulator version x"), Status::Missing);
        let absent = qemu("/usr/bin/qemu".as_ref(), Err("No such file or directory".into()));
        assert!(absent.status == Status::Missing && absent.remedy.unwrap().contains("apt install"));
    }

    fn library() -> [u8; 20] {
        let mut header = [0; 20];
        header[..5].copy_from_slice(b"\x7fELF\x02");
        (header[16], header[18]) = (3, 62);
        header
    }

    #[test]
    fn the_shim_loads_or_why_it_does_not_is_told() {
        let judge = |header, loaded| shim("/shim.so".as_ref(), header, loaded);
        let fine = Ok((library(), 0o100_755));
        assert_eq!(judge(fine.clone(), Some(said("", "warning: something else"))).status, Status::Ok);
        let refused = "ERROR: ld.so: object '/shim.so' from LD_PRELOAD cannot be preloaded";
        assert!(judge(fine.clone(), Some(said("", refused))).found.contains("cannot be loaded"));
        let newer = "/lib/libc.so.6: version `GLIBC_2.38' not found (required by /shim.so)";
        assert_eq!(judge(fine, Some(Err(newer.into()))).status, Status::Missing);
        assert!(judge(Ok((library(), 0o100_700)), None).remedy.unwrap().starts_with("chmod 755"));
        assert!(judge(Ok(([0; 20], 0o100_755)), None).found.contains("no library"));
        assert_eq!(judge(Err("absent".into()), None).status, Status::Missing);
    }

    #[test]
    fn files_are_looked_into() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("short");
        std::fs::write(&file, b"\x7fELF").unwrap();
        assert!(header(&file).is_err() && header(directory.path()).is_err());
        // Programs are position-independent, as libraries are.
        let (own, _) = header(&std::env::current_exe().unwrap()).unwrap();
        assert!(is_library(&own));
        let loaded = version_of(Path::new("/bin/true"), Some(&file)).unwrap();
        assert!(loaded.complaint.contains("ld.so"), "{}", loaded.complaint);
    }

    #[test]
    fn the_starter_is_a_program_or_not() {
        let judge = |mode| starter("/starter".as_ref(), mode).status;
        assert_eq!(judge(Ok(0o100_755)), Status::Ok);
        assert_eq!(judge(Ok(0o100_644)), Status::Missing);
        assert_eq!(judge(Err("absent".into())), Status::Missing);
    }
}
