//! Both hosts as they are when they have booted, so that labs need not wait for that.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::hosts::Hosts;
use super::image::{self, Image};
use super::{arguments, emulator};
use crate::cache;
use crate::host::HostId;
use crate::programs::run;

/// To be raised whenever the code below saves another state of the same machines.
const MAKER: &str = "2";
const ROLE: &str = "booted";

/// The saved states of both hosts, and the layers of their disks that belong to them. They are never written to.
#[derive(Debug)]
pub(super) struct Snapshot {
    folder: PathBuf,
}

impl Snapshot {
    /// Returns the snapshot of hosts of that image. It boots and saves them unless an earlier call has done so.
    ///
    /// # Errors
    ///
    /// If they do not boot, or cannot be saved.
    pub(super) fn obtain(image: &Image) -> Result<Self> {
        let program = emulator().obtain()?;
        let version =
            run(program.to_str().context("a path that is no UTF-8")?, &["--version"], Path::new("/"))?;
        let hardware = [HostId::A, HostId::B].map(|id| arguments::hardware(id).join(" "));
        let key = cache::key(&[MAKER, &image::key(), &version, &hardware[0], &hardware[1]]);
        let snapshot = Self { folder: image::folder().join(format!("{ROLE}-{key}")) };
        cache::obtain_keyed(&image::folder(), ROLE, &key, |made| {
            eprintln!("booting VMs, to keep what they are then");
            fs::create_dir(made).with_context(|| format!("creating {}", made.display()))?;
            let saved = Self { folder: made.to_owned() };
            let mut hosts = Hosts::boot(image)?;
            for id in [HostId::A, HostId::B] {
                let layer = hosts.machine_mut(id).save(&saved.state(id))?;
                let disk = saved.disk(id);
                fs::copy(&layer, &disk).with_context(|| format!("copying {}", layer.display()))?;
            }
            Ok(())
        })
        .with_context(|| format!("no snapshot of booted VMs in {}", snapshot.folder.display()))?;
        Ok(snapshot)
    }

    /// Returns the layer of a host's disk. It lies above the image's.
    pub(super) fn disk(&self, host: HostId) -> PathBuf {
        self.folder.join(format!("{}.qcow2", host.letter()))
    }

    /// Returns the memory and the devices of a host.
    pub(super) fn state(&self, host: HostId) -> PathBuf {
        self.folder.join(format!("{}.state", host.letter()))
    }
}
