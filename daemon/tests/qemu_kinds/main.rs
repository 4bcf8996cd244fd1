//! Each kind of QEMU guest that people have is moved, or is refused in words that the documents know.
//!
//! - [`kind`] has the kinds: how QEMU is started, and what is done to it then.
//! - [`table`] is the table in docs/operating.md, with which what is seen is compared. With `MEMLANE_WRITE_KINDS=1` this
//!   test writes it, for the QEMU that it is run with.

#[path = "../common/mod.rs"]
mod common;
mod kind;
mod table;

use std::fs;

use common::Stage;
use common::qemu::{NOBODY, attach, open_to_nobody};
use memlane_lab::{HostId, LabOptions, OVMF, Requirement, RigOptions, qemu, say_skipped};

use kind::{Kind, Start};
use table::Table;

const NEEDS: &[Requirement] = &[
    Requirement::Root,
    Requirement::Ip,
    Requirement::Tc,
    Requirement::Qemu,
    Requirement::Ovmf,
    Requirement::Swtpm,
];

#[test]
fn every_kind_of_guest_moves_or_is_refused_as_documented() {
    let test = "every_kind_of_guest_moves_or_is_refused_as_documented";
    let Some(column) = qemu::VERSIONS.iter().position(|version| version.program() == qemu::program()) else {
        return say_skipped(
            test,
            "the table is about the versions of QEMU that the set-up unpacks, and this is another",
        );
    };
    let lab = LabOptions::default();
    let keys = format!("attach_users = [0, {NOBODY}]\n");
    let tables = common::LIMITS.to_owned();
    let options = RigOptions { lab, keys, tables, ..RigOptions::default() };
    let Some(stage) = Stage::with(test, NEEDS, options) else { return };
    for host in stage.rig.lab().hosts() {
        open_to_nobody(host);
    }
    let mut table = Table::read();
    for (number, kind) in kind::ALL.iter().enumerate() {
        let seen = play(&stage, kind, &format!("guest{number}"));
        println!("{}: {seen}", kind.what);
        table.note(kind.what, seen);
    }
    table.check(column);
}

/// Has a guest move, and returns what comes of that.
fn play(stage: &Stage, kind: &Kind, name: &str) -> String {
    let [a, b] = stage.rig.lab().hosts();
    let disk = a.directory().join("disk.img");
    fs::File::create(&disk).unwrap().set_len(8 << 20).unwrap();
    fs::copy(OVMF.1, a.directory().join("variables.fd")).unwrap();
    let here = Start::new(kind, name, &disk).on(a, false);
    let refused = |text: &str| match kind.words {
        "" => format!("refused: {text}"),
        words if text.contains(words) => format!("refused: {words}"),
        _ => format!("refused, in other words than {:?}: {text}", kind.words),
    };
    let answer = attach(stage, HostId::A, name, &here.qmp, &[]);
    if answer.code != 0 {
        return refused(&answer.text);
    }
    let there = Start::new(kind, name, &disk).on(b, true);
    let answer = attach(stage, HostId::B, name, &there.qmp, &["--incoming"]);
    assert_eq!(answer.code, 0, "{}: {}", kind.what, answer.text);
    (kind.then)(&here);
    let answer = stage.migrate(name, &["--verify"]);
    let seen = match answer.code {
        0 => "moves".to_owned(),
        3 => refused(&answer.text),
        code => format!("fails with {code}: {}", answer.text),
    };
    if answer.code == 0 {
        stage.wait_for_end(name);
    }
    for id in [HostId::A, HostId::B] {
        // Where it is no more, there is nothing to let go of.
        let _ = stage.rig.ctl(id, &["detach", name]);
    }
    seen
}
