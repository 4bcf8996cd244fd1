//! The folder in which debhelper finds everything that is packed, each where `systemd/debian/install` says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use memlane_lab::Programs;

/// The programs for people.
const PROGRAMS: [&str; 4] = ["memlaned", "memlanectl", "memlane-qemu", "memlane-vmm"];
/// What programs start or load.
const LIBRARIES: [&str; 2] = ["memlane-starter", "libmemlane_shim.so"];
/// Files of the sources, and where they go.
const FILES: [(&str, &str); 12] = [
    ("systemd/memlaned.service", "units/"),
    ("systemd/memlane-guest.socket", "units/"),
    ("systemd/memlane-guest@.service", "units/"),
    ("systemd/memlane.sysusers", "debian/memlane.sysusers"),
    ("systemd/memlane.tmpfiles", "debian/memlane.tmpfiles"),
    ("systemd/memlane.udev", "debian/memlane.udev"),
    ("systemd/memlane-qemu.apparmor", "apparmor/memlane-qemu"),
    ("systemd/memlaned.toml", "examples/"),
    ("systemd/memlaned-credentials.conf", "examples/"),
    ("README.md", ""),
    ("CHANGELOG.md", ""),
    ("LICENSE", ""),
];
/// Folders of the sources, and where they go.
const FOLDERS: [(&str, &str); 3] =
    [("systemd/debian", "debian"), ("docs", "docs"), ("perf/dashboards", "dashboards")];

/// A folder that is laid out.
pub(super) struct Stage {
    directory: PathBuf,
}

impl Stage {
    /// Lays out the package of a version in a folder of `beside`, in the place of an earlier one.
    pub(super) fn lay(beside: &Path, version: &str, programs: &Programs, manual: &Path) -> Result<Self> {
        let stage = Self { directory: beside.join(format!("memlane-{version}")) };
        if stage.directory.exists() {
            fs::remove_dir_all(&stage.directory)
                .with_context(|| format!("removing {}", stage.directory.display()))?;
        }
        for program in PROGRAMS {
            stage.copy(&programs.path(program), "bin/")?;
        }
        for library in LIBRARIES {
            stage.copy(&programs.path(library), "lib/")?;
        }
        for (folder, to) in FOLDERS {
            stage.copy_folder(&sources().join(folder), to)?;
        }
        for (file, to) in FILES {
            stage.copy(&sources().join(file), to)?;
        }
        stage.copy_folder(&manual.join("man"), "man")?;
        stage.copy_folder(&manual.join("completions"), "completions")?;
        // bash looks for it by the name of the program.
        stage.copy(&manual.join("completions/memlanectl.bash"), "completions/memlanectl")?;
        stage.write_changelog(version)?;
        Ok(stage)
    }

    /// Returns the folder.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Copies a file, under its own name where `to` ends with a slash.
    fn copy(&self, file: &Path, to: &str) -> Result<()> {
        let name = file.file_name().context("a file without a name")?;
        let to = match to.is_empty() || to.ends_with('/') {
            true => self.directory.join(to).join(name),
            false => self.directory.join(to),
        };
        let copied = to.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::copy(file, &to));
        copied.with_context(|| format!("copying {} to {}", file.display(), to.display()))?;
        Ok(())
    }

    /// Copies the files of a folder.
    fn copy_folder(&self, folder: &Path, to: &str) -> Result<()> {
        for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
            let file = entry?.path();
            if file.is_file() {
                self.copy(&file, &format!("{to}/"))?;
            }
        }
        Ok(())
    }

    /// Writes what dpkg takes name, version and time of the package from.
    fn write_changelog(&self, version: &str) -> Result<()> {
        // The time of the last commit, so that one tree makes one package.
        let git = Command::new("git").args(["log", "-1", "--format=%cD"]).current_dir(sources()).output();
        let date = git.ok().filter(|output| output.status.success()).map(|output| output.stdout);
        let date = match date.and_then(|date| String::from_utf8(date).ok()) {
            Some(date) if !date.trim().is_empty() => date,
            // Not every copy of the sources has its history.
            _ => String::from_utf8(Command::new("date").arg("-R").output().context("running date")?.stdout)?,
        };
        let maintainer = fs::read_to_string(sources().join("systemd/debian/control"))?;
        let maintainer = maintainer.lines().find_map(|line| line.strip_prefix("Maintainer: "));
        let maintainer = maintainer.context("systemd/debian/control names no maintainer")?;
        ensure!(!date.trim().is_empty(), "what time it is is not known");
        let text = format!(
            "memlane ({version}) unstable; urgency=medium\n\n  * See /usr/share/doc/memlane/CHANGELOG.md.gz.\n\n -- \
             {maintainer}  {}\n",
            date.trim()
        );
        fs::write(self.directory.join("debian/changelog"), text).context("writing the changelog")
    }
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}
