//! A guest of memlane-vmm, which knows from its own workload what every byte of its memory must be.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use memlane_lab::{GuestHistory, HostId, LabVmm, NotedState, Rig};

use crate::common::ask::{DaemonFacts, await_attached, examine};

/// Longest wait for a VMM's answer, on a machine that is busy with other things: it compares all of a guest that never idles.
const ANSWER: Duration = Duration::from_secs(300);

/// A guest of memlane-vmm, with a VMM on each host, as far as there is one.
pub(crate) struct LinkedGuest {
    name: String,
    arguments: Vec<String>,
    /// The VMMs, by host.
    places: [Option<VmmPlace>; 2],
    /// The number of VMMs that were started for it.
    started: u32,
}

/// A VMM and what it wrote.
struct VmmPlace {
    vmm: LabVmm,
    history: PathBuf,
}

impl LinkedGuest {
    /// Starts the guest on a host.
    ///
    /// # Errors
    ///
    /// If its VMM does not come up.
    pub(crate) fn start(rig: &mut Rig, at: HostId, name: &str, arguments: &str) -> Result<Self> {
        let arguments = arguments.split_whitespace().map(str::to_owned).collect();
        let mut guest = Self { name: name.to_owned(), arguments, places: [None, None], started: 0 };
        guest.start_vmm(rig, at, false)?;
        Ok(guest)
    }

    /// Sees to it that a VMM waits for the guest on a host.
    ///
    /// # Errors
    ///
    /// If it does not come up.
    pub(crate) fn prepare(&mut self, rig: &mut Rig, to: HostId) -> Result<()> {
        match self.state(to) {
            Some(_) => Ok(()),
            None => self.start_vmm(rig, to, true),
        }
    }

    fn start_vmm(&mut self, rig: &mut Rig, at: HostId, incoming: bool) -> Result<()> {
        self.started += 1;
        let directory = rig.lab().host(at).directory();
        let history = directory.join(format!("{}-{}.history", self.name, self.started));
        let mut arguments = self.arguments.clone();
        arguments.extend(["--history".to_owned(), history.display().to_string()]);
        if incoming {
            arguments.push("--incoming".to_owned());
        }
        let mut vmm = rig.start_vmm_unattended(at, &self.name, &arguments)?;
        await_attached(rig, at, &self.name, &mut vmm)
            .with_context(|| format!("starting a VMM for {}", self.name))?;
        self.places[at as usize] = Some(VmmPlace { vmm, history });
        Ok(())
    }

    /// Says why the VMM on a host, and what its daemon says about it, are not what they are when nothing is under way.
    pub(crate) fn unsettled(&mut self, at: HostId, daemon: &DaemonFacts) -> Option<String> {
        let standing = daemon.standing.as_deref();
        let state = self.state(at);
        let settled = match state {
            None => standing.is_none(),
            Some(NotedState::Running) => standing == Some("running"),
            Some(NotedState::Incoming) => standing.is_none_or(|standing| standing == "incoming"),
            Some(_) => false,
        };
        (!settled).then(|| format!("the VMM is {state:?}, and its daemon says {standing:?}"))
    }

    /// Returns whether the guest runs on a host, by what its VMM says.
    pub(crate) fn runs(&mut self, at: HostId) -> bool {
        self.state(at) == Some(NotedState::Running)
    }

    /// Returns what the VMM on a host last wrote about the guest; `None` if there is no VMM any more.
    fn state(&mut self, at: HostId) -> Option<NotedState> {
        let place = self.places[at as usize].as_mut()?;
        if !place.vmm.process().is_running() {
            return None;
        }
        GuestHistory::read(&place.history).last()
    }

    /// Says when the guest ran on both hosts at once, if it did since the VMMs were started that are or were there last.
    pub(crate) fn two_owners(&self) -> Option<String> {
        let [a, b] = self.places.each_ref().map(|place| {
            place.as_ref().map(|place| GuestHistory::read(&place.history).ran()).unwrap_or_default()
        });
        let overlap = a.iter().find_map(|(start, end)| {
            let other = b.iter().find(|(other, other_end)| {
                end.is_none_or(|end| *other < end) && other_end.is_none_or(|other_end| *start < other_end)
            });
            other.map(|other| (*start, *end, *other))
        });
        overlap.map(|(start, end, other)| {
            format!(
                "two owners: it ran at host-a from {start} to {end:?}, and at host-b from {} to {:?}",
                other.0, other.1
            )
        })
    }

    /// Checks that the guest goes on, and that its memory is what it must be.
    ///
    /// # Errors
    ///
    /// If that is not so, or it has no VMM there.
    pub(crate) fn examine(&mut self, at: HostId) -> Result<()> {
        examine(&mut self.places[at as usize].as_mut().context("it has no VMM there")?.vmm, ANSWER)
    }

    /// Returns the files that say more about the guest: histories, and logs of its VMMs.
    pub(crate) fn files(&mut self) -> Vec<PathBuf> {
        let places = self.places.iter_mut().flatten();
        places.flat_map(|place| [place.history.clone(), place.vmm.process().log().to_owned()]).collect()
    }
}
