//! The two VMs and what joins them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::cables;
use super::image::Image;
use super::machine::{Beginning, Machine};
use super::shell::CONFIG;
use super::snapshot::Snapshot;
use crate::child::kill_all_naming;
use crate::cleanup::Registration;
use crate::host::HostId;
use crate::lab::{directory, unique_id};
use crate::lan::Lan;
use crate::namespace;
use crate::requirements::{Requirement, why_not};

/// Two VMs, joined by a control link and two ports, and by their bridges `br0` to the switch of a guests' network, on
/// which a client is. There is nothing else that they can reach. Dropping this ends them, and what they have written is
/// gone.
#[derive(Debug)]
pub struct Hosts {
    machines: [Machine; 2],
    lan: Lan,
    directory: PathBuf,
    // After `machines`: fields are dropped in order, and what is left is killed and removed then.
    _cleanup: Registration,
}

impl Hosts {
    /// Starts both hosts as they are after a boot, from a snapshot, with their clocks set. The first call makes the image
    /// and the snapshot, which takes some minutes; the next ones take seconds.
    ///
    /// # Errors
    ///
    /// If something that the hosts need is missing, or they do not start. What their consoles and their QEMUs said is
    /// part of the error.
    pub fn start() -> Result<Self> {
        let image = Image::obtain()?;
        let snapshot = Snapshot::obtain(&image)?;
        let files = [HostId::A, HostId::B].map(|id| (snapshot.disk(id), snapshot.state(id)));
        let [a, b] = files.each_ref().map(|(disk, state)| Beginning::GoOn { disk, state });
        let mut hosts = Self::switch_on(&image, [a, b])?;
        hosts.machines.iter_mut().try_for_each(Machine::wait_until_resumed)?;
        Ok(hosts)
    }

    /// Boots both hosts.
    pub(super) fn boot(image: &Image) -> Result<Self> {
        let disk = image.disk();
        let mut hosts = Self::switch_on(image, [Beginning::Boot(&disk), Beginning::Boot(&disk)])?;
        hosts.machines.iter_mut().try_for_each(Machine::wait_until_started)?;
        Ok(hosts)
    }

    /// Returns one of the hosts.
    pub fn machine(&self, id: HostId) -> &Machine {
        &self.machines[id as usize]
    }

    /// Returns one of the hosts, to cut its power or to start it again.
    pub fn machine_mut(&mut self, id: HostId) -> &mut Machine {
        &mut self.machines[id as usize]
    }

    /// Returns both hosts, A first.
    pub fn machines(&self) -> &[Machine; 2] {
        &self.machines
    }

    /// Returns the guests' network. Its switch is not on any of the hosts: it learns behind which of them a guest is.
    pub fn lan(&self) -> &Lan {
        &self.lan
    }

    /// Returns the file with which `ssh -F` reaches the hosts by their names, as root.
    pub fn ssh_config(&self) -> PathBuf {
        self.directory.join(CONFIG)
    }

    fn switch_on(image: &Image, beginnings: [Beginning<'_>; 2]) -> Result<Self> {
        if let Some(reason) = why_not(&[Requirement::Root, Requirement::Ip]) {
            bail!("cannot start VMs: {reason}");
        }
        namespace::sweep();
        let id = unique_id();
        let directory = directory(&id)?;
        let names = ["switch", "client", "cables"].map(|name| format!("{id}-{name}"));
        // Registered before anything is made, so that an error or a signal half way leaves nothing.
        let cleanup = Registration::new({
            let (names, directory) = (names.clone(), directory.clone());
            move || {
                // All of it is named in what QEMU and ssh were started with.
                kill_all_naming(&directory);
                for name in &names {
                    namespace::remove(name);
                }
                // Best effort: the next sweep tries again.
                let _ = fs::remove_dir_all(&directory);
            }
        });
        let config = directory.join(CONFIG);
        // Each host has a file of its own, which is written anew when it is started again.
        fs::write(&config, format!("Include {}/*/{CONFIG}\n", directory.display()))
            .with_context(|| format!("writing {}", config.display()))?;
        let (lan, [ends_a, ends_b]) = cables::lay(&names)?;
        let [first, second] = beginnings;
        let machines = [
            Machine::start(HostId::A, image, &directory, ends_a, first)?,
            Machine::start(HostId::B, image, &directory, ends_b, second)?,
        ];
        Ok(Self { machines, lan, directory, _cleanup: cleanup })
    }
}
