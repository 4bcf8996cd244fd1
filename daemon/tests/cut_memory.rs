//! A VMM that truncates the file behind its guest's memory loses that guest's migration, and nobody else's: the
//! daemons live, and a neighbour that is in post-copy meanwhile arrives whole.

mod common;

use std::fs::File;
use std::path::PathBuf;

use common::{LONG, Order, Stage, assert_runs, wait_for_exit, words};
use memlane_api::types::Phase;
use memlane_lab::{HostId, LabOptions, LabVmm, Rate, wait_for};

/// What the culprit is told.
const REASON: &str = "the guest's memory file was truncated by its VMM";
/// A guest that all of its memory is needed of, and that writes all over it.
const NEIGHBOUR: &str = "--ram 64MiB --working-set 48MiB --flat-out --fill zero=10,random=80,compressible=10";
/// A guest that has far more than it touches, so that its VMM lives when the rest is cut off.
const CULPRIT: &str = "--ram 256MiB --working-set 8MiB --rate 1000 --fill random=100";
/// What is left of its memory.
const LEFT: u64 = 32 << 20;

/// Two hosts, and a guest in post-copy between them.
struct Street {
    stage: Stage,
    neighbour: (LabVmm, LabVmm),
    order: Order,
}

impl Street {
    fn new(test: &str) -> Option<Self> {
        let port_rate = Some(Rate::from_bits_per_second(50_000_000));
        let mut stage = Stage::new(test, LabOptions { ports: 1, port_rate, ..LabOptions::default() })?;
        let here = stage.rig.start_vmm(HostId::A, "web1", &words(NEIGHBOUR)).unwrap();
        let there = words(&format!("{NEIGHBOUR} --incoming"));
        let there = stage.rig.start_vmm(HostId::B, "web1", &there).unwrap();
        let order = stage.begin("web1", &["--postcopy", "now"]);
        wait_for_fetching(&stage, "web1");
        Some(Self { stage, neighbour: (here, there), order })
    }

    /// A VMM of the culprit's whose memory is in a file on a host.
    fn start(&mut self, id: HostId, more: &str) -> (LabVmm, PathBuf) {
        let file = self.stage.rig.lab().host(id).memory_directory().join("culprit");
        let arguments = words(&format!("{CULPRIT} {more} --backing {}", file.display()));
        (self.stage.rig.start_vmm(id, "culprit", &arguments).unwrap(), file)
    }

    /// Nobody but the culprit has come to harm.
    fn assert_peaceful(mut self) {
        for id in [HostId::A, HostId::B] {
            assert!(self.stage.rig.daemon(id).is_running(), "{}", self.stage.rig.daemon(id).log_tail());
        }
        self.stage.rig.lab().set_port_rate(0, None).unwrap();
        self.order.expect(0, &[]);
        let (mut here, mut there) = self.neighbour;
        assert_runs(&mut there);
        wait_for_exit(here.process());
    }
}

fn wait_for_fetching(stage: &Stage, name: &str) {
    stage.wait_until(HostId::A, name, "post-copy", |migration| {
        let fetched = migration.postcopy.as_ref().map_or(0, |postcopy| postcopy.pages_streamed);
        migration.phase == Phase::Fetching && fetched > 100
    });
}

/// Waits until much of the culprit's memory has come, and much has not.
fn wait_for_copying(stage: &Stage) {
    stage.wait_until(HostId::A, "culprit", "pages", |migration| migration.pages_sent > 500);
}

fn cut(file: &PathBuf, bytes: u64) {
    File::options().write(true).open(file).unwrap().set_len(bytes).unwrap();
}

#[test]
fn memory_is_cut_while_it_is_sent() {
    let Some(mut street) = Street::new("memory_is_cut_while_it_is_sent") else { return };
    let (mut culprit, file) = street.start(HostId::A, "");
    let _receiver =
        street.stage.rig.start_vmm(HostId::B, "culprit", &words(&format!("{CULPRIT} --incoming")));
    let order = street.stage.begin("culprit", &["--converge", "none"]);
    wait_for_copying(&street.stage);
    cut(&file, LEFT);
    order.expect(4, &[REASON]);
    // It runs on, as far as its VMM can tell, and cannot be moved any more.
    street.stage.wait_for_standing(HostId::A, "culprit", "running");
    assert!(culprit.process().is_running());
    street.stage.assert_refused("culprit", &[], &[REASON]);
    street.assert_peaceful();
}

#[test]
fn memory_is_cut_while_it_is_received() {
    let Some(mut street) = Street::new("memory_is_cut_while_it_is_received") else { return };
    let mut culprit = street.stage.rig.start_vmm(HostId::A, "culprit", &words(CULPRIT)).unwrap();
    let (_receiver, file) = street.start(HostId::B, "--incoming --prepare");
    let order = street.stage.begin("culprit", &["--converge", "none"]);
    wait_for_copying(&street.stage);
    cut(&file, LEFT);
    order.expect(4, &[REASON]);
    street.stage.assert_runs_on("culprit", &mut culprit);
    street.stage.assert_refused("culprit", &[], &[REASON]);
    street.assert_peaceful();
}

#[test]
fn memory_is_cut_while_it_is_fetched_from() {
    let Some(mut street) = Street::new("memory_is_cut_while_it_is_fetched_from") else { return };
    let (_culprit, file) = street.start(HostId::A, "");
    let arguments = words(&format!("{CULPRIT} --incoming"));
    let mut there = street.stage.rig.start_vmm(HostId::B, "culprit", &arguments).unwrap();
    let order = street.stage.begin("culprit", &["--postcopy", "now"]);
    wait_for_fetching(&street.stage, "culprit");
    cut(&file, LEFT);
    order.expect(7, &[REASON]);
    let ended =
        street.stage.wait_until(HostId::B, "culprit", "the end", |migration| migration.outcome.is_some());
    assert_eq!(ended.outcome.unwrap().as_str(), "lost", "{ended:?}");
    // What is missing never comes as zeros: the guest fails at it.
    wait_for("the guest to fail", LONG, || (!there.process().is_running()).then_some(())).unwrap();
    street.assert_peaceful();
}
