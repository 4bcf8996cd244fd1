//! What the tests share: the library as cargo has built it, a daemon, and the memory of a program
//! as the daemon sees it.

#![allow(dead_code, unused_imports, reason = "every test binary uses its own part of it")]

mod daemon;
mod memory;
mod seccomp;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::time::Duration;

use memlane_lab::say_skipped;

pub(crate) use daemon::{Connection, Daemon, Handles};
pub(crate) use memory::{Memory, RamFile};
pub(crate) use seccomp::forbid;

/// Longest wait for anything, on a machine that is busy with other things.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// What tells the shim where the daemon is.
pub(crate) const VARIABLE: &str = "MEMLANE_ATTACH_SOCKET";

/// What cargo makes of this package.
pub(crate) struct Built {
    /// `libmemlane_shim.so`.
    pub library: PathBuf,
    /// The example program `writer`.
    pub writer: PathBuf,
}

impl Built {
    /// Builds what is not up to date. Where the files are, cargo knows best.
    pub(crate) fn get() -> &'static Self {
        static BUILT: OnceLock<Built> = OnceLock::new();
        BUILT.get_or_init(|| {
            let mut command = Command::new(env!("CARGO"));
            command.current_dir(env!("CARGO_MANIFEST_DIR")).args(["build", "--quiet", "--locked"]);
            command.args(["--lib", "--example", "writer", "--message-format", "json"]);
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let text = String::from_utf8(output.stdout).unwrap();
            let messages: Vec<serde_json::Value> =
                text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            let made = |target: &str, end: &str| {
                let files = messages.iter().filter(|message| message["target"]["name"] == target);
                let mut files =
                    files.flat_map(|message| message["filenames"].as_array().into_iter().flatten());
                let found = files.find_map(|file| file.as_str().filter(|file| file.ends_with(end)));
                PathBuf::from(found.unwrap_or_else(|| panic!("cargo has built no {target}")))
            };
            Self { library: made("memlane_shim", ".so"), writer: made("writer", "writer") }
        })
    }
}

/// `command` with the shim in it, which looks for the daemon at `socket`.
pub(crate) fn preload<'a>(command: &'a mut Command, socket: &Path) -> &'a mut Command {
    command.env("LD_PRELOAD", &Built::get().library).env(VARIABLE, socket)
}

/// Opens /dev/userfaultfd, as a daemon does; says that `test` is skipped where it cannot.
pub(crate) fn device(test: &str) -> Option<File> {
    match File::options().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => Some(device),
        Err(error) => {
            say_skipped(test, &format!("/dev/userfaultfd cannot be opened: {error}"));
            None
        }
    }
}

/// A program that is ended with the test.
pub(crate) struct Running(pub Child);

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
