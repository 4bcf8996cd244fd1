//! Daemons that are no root, as their unit for systemd has them.

mod common;

use common::{LIMITS, Stage};
use memlane_lab::{DaemonUser, LabOptions, Requirement, RigOptions};

fn stage(test: &str, daemon_user: DaemonUser, lab: LabOptions) -> Option<Stage> {
    let options = RigOptions { lab, tables: LIMITS.into(), daemon_user, ..RigOptions::default() };
    Stage::with(test, Requirement::LAB_WITH_KVM, options)
}

#[test]
fn the_units_user_moves_guests() {
    let Some(mut stage) = stage("the_units_user_moves_guests", DaemonUser::Unit, LabOptions::default())
    else {
        return;
    };
    for more in [&["--verify"][..], &["--postcopy", "now"]] {
        let mut here = stage.guest("web1");
        let mut there = stage.receiver("web1");
        let answer = stage.migrate("web1", more);
        assert_eq!(answer.code, 0, "{}", answer.text);
        common::assert_runs(&mut there);
        common::wait_for_exit(here.process());
        there.quit().unwrap();
    }
}
