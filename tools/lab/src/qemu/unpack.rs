//! Unpacking a QEMU from its package, with all that it depends on.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{FlockOperation, flock};

use super::Version;
use super::archive::DebianArchive;
use crate::programs::{in_path, run};

/// The path of the program in the folder that it was unpacked into.
pub(super) const PROGRAM: &str = "usr/bin/qemu-system-x86_64";

/// The packages that are unpacked. Network cards boot with code of ipxe-qemu.
const PACKAGES: &str = "qemu-system-x86,ipxe-qemu";
/// The directories of libraries in the folder. One of them contains the loader.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
const LOADER: &str = "ld-linux-x86-64.so.2";
/// The prefix of the names of folders that are not complete yet.
const UNFINISHED: &str = ".unpack-";
/// The programs that unpack it. Each is a Debian package of the same name.
const TOOLS: [&str; 2] = ["mmdebstrap", "patchelf"];

/// Makes sure that a version of QEMU is in `directory`, and unpacks it there if it is not.
pub(super) fn obtain(version: Version, directory: &Path) -> Result<()> {
    let Version { name, suite, .. } = version;
    let program = directory.join(PROGRAM);
    if start(&program, name).is_ok() {
        return Ok(());
    }
    ensure!(rustix::process::geteuid().is_root(), "that is for root (use sudo)");
    let beside = directory.parent().context("a directory has a parent")?;
    fs::create_dir_all(beside).with_context(|| format!("creating {}", beside.display()))?;
    let lock = beside.join(".lock");
    let lock = File::create(&lock).with_context(|| format!("creating {}", lock.display()))?;
    flock(&lock, FlockOperation::LockExclusive).context("waiting for others who unpack it")?;
    // Nobody else is at work now, but somebody may have been before.
    if start(&program, name).is_ok() {
        return Ok(());
    }
    sweep(beside)?;
    eprintln!("unpacking QEMU {name} of Debian's {suite}");
    install_tools()?;
    // Under a name that nobody looks for, so that what is found is whole.
    let unpacked =
        tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(beside).context("making a directory")?;
    let root = unpacked.path().join("root");
    extract(version, &root)?;
    make_own(&root, directory)?;
    // Of another version, or it was moved and does not start any more.
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", directory.display()));
        }
        _ => {}
    }
    fs::rename(&root, directory).context("putting QEMU in its place")?;
    start(&program, name)
}

/// Starts the program, and checks that it says that it is that version.
fn start(program: &Path, version: &str) -> Result<()> {
    let name = program.to_str().context("a path that is no UTF-8")?;
    let said = run(name, &["--version"], Path::new("/"))?;
    ensure!(said.contains(&format!("version {version}.")), "{name} is no QEMU {version}: {}", said.trim());
    Ok(())
}

/// Removes folders that are not complete because an earlier call was interrupted.
fn sweep(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(UNFINISHED)) {
            fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

fn install_tools() -> Result<()> {
    let lacking: Vec<&str> = TOOLS.into_iter().filter(|tool| !in_path(tool)).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let install = [&["install", "-qy", "--no-install-recommends"], &lacking[..]].concat();
    if run("apt-get", &install, Path::new("/")).is_err() {
        // A fresh machine has no lists yet, and others have old ones.
        run("apt-get", &["update", "-q"], Path::new("/"))?;
        run("apt-get", &install, Path::new("/"))?;
    }
    Ok(())
}

fn extract(Version { suite, backported, .. }: Version, root: &Path) -> Result<()> {
    let mut last = None;
    let path = root.to_str().context("a path that is no UTF-8")?;
    let include = format!("--include={PACKAGES}");
    let backports = format!("{suite}-backports");
    // What is backported is not taken unless that is asked for.
    let prefer = format!("--aptopt=APT::Default-Release \"{backports}\"");
    for archive in DebianArchive::all()? {
        let sources = [archive.source(suite), archive.source(&backports)];
        let mut arguments = vec!["--quiet", "--variant=extract", &include, suite, path, &sources[0]];
        if backported {
            arguments.insert(2, &prefer);
            arguments.push(&sources[1]);
        }
        match run("mmdebstrap", &arguments, Path::new("/")) {
            Ok(_) => return Ok(()),
            Err(error) => last = Some(error),
        }
        let _ = fs::remove_dir_all(root);
    }
    Err(last.context("no archive was asked")?)
}

/// Makes the program in `root` use only what is in its folder, which will be `directory`, and nothing of the machine's.
fn make_own(root: &Path, directory: &Path) -> Result<()> {
    let program = root.join(PROGRAM);
    let libraries = LIBRARIES.map(|libraries| directory.join(libraries).display().to_string());
    let at = LIBRARIES.iter().position(|libraries| root.join(libraries).join(LOADER).exists());
    let loader = format!("{}/{LOADER}", libraries[at.context("no loader was unpacked")?]);
    let program = program.to_str().context("a path that is no UTF-8")?;
    let search = libraries.join(":");
    let arguments = ["--set-interpreter", &loader, "--force-rpath", "--set-rpath", &search, program];
    run("patchelf", &arguments, Path::new("/"))?;
    // Where this is beside the program, it looks for its firmware below it, and nowhere else.
    symlink("../..", root.join(PROGRAM).with_file_name("qemu-bundle"))
        .context("showing QEMU its firmware")?;
    // It names the archive, for nobody.
    let _ = fs::remove_dir_all(root.join("etc/apt"));
    Ok(())
}
