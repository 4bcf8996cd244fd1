//! A guest of one sector on host A, and a QEMU on host B that waits for it.

use std::io::{Seek, SeekFrom, Write};
use std::time::Duration;

use memlane_lab::qmp::Monitor;
use memlane_lab::{HostId, LabHost, LabOptions, Rate, Requirement, RigOptions, wait_for};
use serde_json::{Value, json};

use crate::common::qemu::{Qemu, attach_both, ram_file};
use crate::common::{LIMITS, LONG, Stage, boot_sector};

const NEEDS: &[Requirement] = &[Requirement::Root, Requirement::Ip, Requirement::Tc, Requirement::Qemu];

/// A guest on host A, and a QEMU on host B that waits for it.
pub(crate) struct Scene {
    pub here: Qemu,
    pub there: Qemu,
    pub stage: Stage,
}

impl Scene {
    pub(crate) fn new(test: &str, more: &str, port_rate: Option<Rate>) -> Option<Self> {
        let lab = LabOptions { ports: 1, port_rate, ..LabOptions::default() };
        let stage =
            Stage::with(test, NEEDS, RigOptions { lab, tables: LIMITS.into(), ..RigOptions::default() })?;
        let [a, b] = stage.rig.lab().hosts();
        let arguments = format!("{} {more}", boot_sector::arguments(a));
        let here = Qemu::start(a, "web1", &arguments);
        let there = Qemu::start(b, "web1", &format!("{arguments} -incoming defer"));
        let scene = Self { here, there, stage };
        attach_both(&scene.stage, &scene.here, &scene.there);
        scene.wait_for_boot();
        Some(scene)
    }

    /// Starts another QEMU on host A, which waits for the guest to come back.
    pub(crate) fn wait_at_a(&self) -> Qemu {
        let a = self.stage.rig.lab().host(HostId::A);
        let back = Qemu::start(a, "web1", &format!("{} -incoming defer", boot_sector::arguments(a)));
        let attached =
            || (back.attach(&self.stage, HostId::A, "web1", &["--incoming"]).code == 0).then_some(());
        wait_for("the guest's name to be free", LONG, attached).unwrap();
        back
    }

    /// The guest waits for a key when it has read its sector, which firmware does once.
    fn wait_for_boot(&self) {
        let read = || {
            let stats = self.here.run("query-blockstats");
            let done = stats[0]["stats"]["rd_operations"].as_u64()?;
            (done > 0).then_some(())
        };
        wait_for("the guest to boot", LONG, read).unwrap();
        std::thread::sleep(Duration::from_millis(300));
    }

    pub(crate) fn press(&self, qemu: &Qemu, key: &str) {
        qemu.run_with("send-key", json!({ "keys": [{ "type": "qcode", "data": key }] }));
    }

    pub(crate) fn wait_for_status(&self, qemu: &Qemu, status: &str) {
        let has = || (qemu.run("query-status")["status"] == status).then_some(());
        wait_for(status, LONG, has).unwrap();
    }

    pub(crate) fn fill(&self) {
        fill(self.stage.rig.lab().host(HostId::A));
    }

    /// The guest moves to host B, where it is in this state, and never ran.
    pub(crate) fn assert_moves_and_stays(&self, state: &str) {
        let mut events = Monitor::connect(&self.there.ours).unwrap();
        let answer = self.stage.migrate("web1", &["--verify"]);
        assert_eq!(answer.code, 0, "{}", answer.text);
        let moved: Value = serde_json::from_str(answer.text.lines().last().unwrap()).unwrap();
        assert_eq!(moved["guest_stays"], state, "{moved}");
        assert_eq!(events.execute("query-status", json!({})).unwrap()["status"], state);
        self.stage.wait_for_end("web1");
    }
}

/// A port on which what [`Scene::fill`] writes takes some seconds.
pub(crate) fn slow() -> Option<Rate> {
    Some(Rate::from_bits_per_second(30_000_000))
}

/// Fills part of the memory of guest `web1` on a host with what takes long to send.
pub(crate) fn fill(host: &LabHost) {
    let mut file = std::fs::File::options().write(true).open(ram_file(host, "web1")).unwrap();
    file.seek(SeekFrom::Start(32 << 20)).unwrap();
    let mut state = 1u64;
    let mut bytes = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    file.write_all(&(0..24 << 20).map(|_| bytes()).collect::<Vec<u8>>()).unwrap();
}
