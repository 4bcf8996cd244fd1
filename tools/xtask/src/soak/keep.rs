//! Keeping what is needed to understand what failed.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use memlane_lab::HostId;

use super::fleet::Fleet;
use crate::common::files::copy_if_there;

/// Writes `text`, and everything that the fleet has written, to `folder`.
///
/// # Errors
///
/// If that cannot be done.
pub(crate) fn keep(folder: &Path, fleet: &mut Fleet, text: &str) -> Result<()> {
    let write = |fleet: &mut Fleet| -> Result<()> {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("step.txt"), text)?;
        for id in [HostId::A, HostId::B] {
            let host = fleet.rig.lab().host(id);
            let own = folder.join(host.name());
            fs::create_dir_all(&own)?;
            copy_if_there(&host.directory().join("journal"), &own.join("journal"))?;
            // Logs of daemons and VMMs, histories, and what a guest has printed.
            for entry in fs::read_dir(host.directory())?.flatten() {
                let path = entry.path();
                let wanted = path
                    .extension()
                    .is_some_and(|kind| ["log", "history", "console", "toml"].iter().any(|one| kind == *one));
                if wanted {
                    copy_if_there(&path, &own.join(entry.file_name()))?;
                }
            }
        }
        for file in fleet.files() {
            let name = file.to_string_lossy().trim_start_matches('/').replace('/', "_");
            if file.ends_with("qemu.log") {
                copy_if_there(&file, &folder.join(name))?;
            }
        }
        Ok(())
    };
    write(fleet).with_context(|| format!("keeping logs in {}", folder.display()))
}
