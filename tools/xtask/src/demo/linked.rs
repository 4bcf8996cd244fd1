//! Guests of `memlane-vmm`, which links Memlane: their memory is compared with a model.

use anyhow::Result;
use memlane_lab::{HostId, LabVmm, Readers, Rig};
use serde_json::{Value, json};

use super::options::{DemoOptions, GUEST, GuestChoice, PROOF_LIMIT, RUN_ON, WARM_UP};
use super::report::{DemoMove, DemoReport};

/// The guest's network interface, which is announced after each move.
const NIC: &str = "52:54:00:4d:4c:01@lan";
/// The number of pages that the guest writes in a second.
const DIRTY_RATE: u64 = 10_000;

impl DemoOptions {
    /// Starts a VMM with a guest, and moves it.
    pub(crate) fn move_linked_guest(&self, rig: &mut Rig) -> Result<DemoReport> {
        let mut at = HostId::A;
        let mut vmm = rig.start_vmm(at, GUEST, &self.vmm_arguments(false))?;
        std::thread::sleep(WARM_UP);
        let count = self.moves(1);
        let mut legs = Vec::new();
        for number in 1..=count {
            let leg;
            (leg, vmm) = self.leg(rig, at, vmm, (number, count))?;
            let whole = leg.is_whole();
            legs.push(leg);
            if !whole {
                break;
            }
            at = at.other();
        }
        let mut proof = None;
        let moved = legs.last().is_some_and(DemoMove::is_whole);
        if moved && !self.verify {
            self.say("once more, comparing digests of all memory in the pause");
            proof = Some(self.prove(rig, at)?);
        }
        drop(vmm);
        Ok(DemoReport {
            guest: self.guest_shape(),
            legs,
            proof,
            limit: self.limit().to_owned(),
            hosts: None,
            encrypted: !self.insecure,
        })
    }

    /// Moves the guest from `at` to the other host; returns what was seen, and the VMM in which
    /// the guest is now.
    fn leg(
        &self,
        rig: &mut Rig,
        at: HostId,
        mut vmm: LabVmm,
        (number, of): (u32, u32),
    ) -> Result<(DemoMove, LabVmm)> {
        let to = at.other();
        let mut next = rig.start_vmm(to, GUEST, &self.vmm_arguments(true))?;
        vmm.reset_stalls()?;
        let destination = rig.lab().host(to).name().to_owned();
        if of > 1 {
            self.say(&format!("move {number} of {of}, to {destination}"));
        }
        let mut readers = match self.readers() {
            0 => None,
            readers => Some(Readers::before(&mut vmm, self.vcpus..self.vcpus + readers)?),
        };
        let migration = self.order(rig, at, &self.migrate(&destination), |migration| {
            if let Some(readers) = &mut readers {
                readers.look(migration);
            }
        })?;
        if migration["outcome"] != "completed" {
            let (stats, oracle, more) = (Value::Null, Value::Null, Value::Null);
            return Ok((DemoMove { number, migration, stats, oracle, readers, more }, vmm));
        }
        let stats = next.stats()?;
        std::thread::sleep(if number == of { RUN_ON } else { RUN_ON / 5 });
        let oracle = next.verify()?;
        Ok((DemoMove { number, migration, stats, oracle, readers, more: Value::Null }, next))
    }

    /// Moves the guest once more, with `--verify`.
    fn prove(&self, rig: &mut Rig, at: HostId) -> Result<Value> {
        let to = at.other();
        let _next = rig.start_vmm(to, GUEST, &self.vmm_arguments(true))?;
        let destination = rig.lab().host(to).name().to_owned();
        let arguments = ["migrate", GUEST, &destination, "--downtime-limit", PROOF_LIMIT, "--verify"];
        rig.ctl(at, &arguments)?.last().cloned()
    }

    fn vmm_arguments(&self, incoming: bool) -> Vec<String> {
        let ram = self.ram().to_string();
        let mut arguments: Vec<String> = ["--ram", &ram, "--nic", NIC].map(str::to_owned).into();
        let (vcpus, readers) = (self.vcpus.saturating_add(self.readers()), self.readers());
        arguments.extend(["--vcpus".into(), vcpus.to_string(), "--readers".into(), readers.to_string()]);
        if let Some(backing) = &self.backing {
            arguments.extend(["--backing".into(), backing.clone()]);
        }
        if self.flat_out {
            arguments.push("--flat-out".into());
        } else {
            arguments.extend(["--rate".into(), self.dirty_rate.unwrap_or(DIRTY_RATE).to_string()]);
        }
        if let Some(working_set) = self.working_set {
            arguments.extend(["--working-set".into(), working_set.to_string()]);
        }
        if let Some(tracker) = self.tracker() {
            let name = format!("{tracker:?}").to_lowercase();
            arguments.extend(["--tracker".into(), name]);
        }
        if self.guest == GuestChoice::Process {
            arguments.extend(["--guest".into(), "process".into()]);
        }
        if self.gap {
            arguments.push("--gap".into());
        }
        if self.prepared {
            arguments.push("--prepare".into());
        }
        if incoming {
            arguments.push("--incoming".into());
        }
        arguments
    }

    fn guest_shape(&self) -> Value {
        let kvm = self.guest == GuestChoice::Kvm;
        let tracker = match self.tracker() {
            Some(tracker) => format!("{tracker:?}").to_lowercase(),
            None if kvm => "log".to_owned(),
            None => "pagemap".to_owned(),
        };
        let dirty_rate = self.dirty_rate.unwrap_or(DIRTY_RATE);
        json!({
            "name": GUEST,
            "vmm": "memlane-vmm",
            "kind": if kvm { "kvm" } else { "process" },
            "vcpus": self.vcpus,
            "readers": self.readers(),
            "tracker": tracker,
            "dirty_rate": if self.flat_out { "flat out".into() } else { Value::from(dirty_rate) },
        })
    }
}
