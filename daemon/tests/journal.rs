//! Daemons whose journal is damaged, missing or another one do not start and say what to do; one whose disk is full
//! does. Until the commit is heard of, what the journal holds is all that tells who owns the guest.

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use common::{LONG, Stage, Tap, assert_runs, wait_for_exit};
use memlane_lab::{HostId, LabOptions, LabVmm, wait_for};
use memlane_protocol::handover::Message;
use memlane_protocol::wire::control::Control;

const FILE: &str = "handover.jsonl";
/// Bytes of a record; the first is the header.
const RECORD: usize = 512;

fn journal(stage: &Stage, id: HostId) -> PathBuf {
    stage.rig.lab().host(id).directory().join("journal")
}

/// Has a guest moved up to the commit, of which the destination does not hear before the source daemon is killed.
fn committed(stage: &mut Stage, tap: &Tap) -> (LabVmm, LabVmm) {
    let (guest, there) = (stage.guest("web1"), stage.receiver("web1"));
    tap.hold(HostId::A, |message| matches!(message, Control::Handover { message: Message::Commit, .. }));
    let order = stage.begin("web1", &["--downtime-limit", "5s"]);
    tap.wait();
    stage.rig.stop_daemon(HostId::A).unwrap();
    tap.lose();
    order.expect(6, &["memlaned"]);
    (guest, there)
}

#[test]
fn a_daemon_does_not_start_with_a_journal_that_does_not_add_up() {
    let test = "a_daemon_does_not_start_with_a_journal_that_does_not_add_up";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    let (mut guest, mut there) = committed(&mut stage, &tap);
    let file = journal(&stage, HostId::A).join(FILE);
    let whole = fs::read(&file).unwrap();
    // After the header, and what was written before the pause.
    let (last, end) = (2 * RECORD, 3 * RECORD);
    let record = String::from_utf8(whole[last..end].to_vec()).unwrap();
    assert!(record.contains("\"committed\"") && record.ends_with('\n'), "{record}");

    let flipped = |byte: usize, bit: u8| {
        let mut bytes = whole.clone();
        bytes[byte] ^= 1 << bit;
        Some(bytes)
    };
    let wiped = |from: usize, to: usize| {
        let mut bytes = whole.clone();
        bytes[from..to].fill(0);
        Some(bytes)
    };
    let cut = |to: usize| Some(whole[..to].to_vec());
    for (what, bytes, says) in [
        ("a bit of the last newline", flipped(end - 1, 0), "damaged at byte 1024:"),
        ("a bit of the sum", flipped(last + 9, 0), "damaged at byte 1024:"),
        ("a bit of the room", flipped(whole.len() - 1, 7), "sum is wrong"),
        ("a cut at a record's end", cut(last), "damaged at byte 1024: the file ends here"),
        ("a cut", cut(last + 100), "damaged at byte 1124: the file ends here"),
        ("an empty file", cut(0), "damaged at byte 0:"),
        ("a NUL at its beginning", wiped(0, 1), "damaged at byte 0:"),
        ("a NUL at the record's beginning", wiped(last, last + 1), "damaged at byte 1024:"),
        ("the record wiped out", wiped(last, end), "damaged at byte 1024:"),
        ("all wiped out", wiped(0, whole.len()), "damaged at byte 0:"),
        ("another host's", fs::read(journal(&stage, HostId::B).join(FILE)).ok(), "another one"),
        ("none", None, "is missing"),
    ] {
        eprintln!("{what}");
        match &bytes {
            Some(bytes) => fs::write(&file, bytes).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        let error = stage.rig.start_daemon(HostId::A).map(|()| "it started").unwrap_err();
        let error = format!("{error:#}");
        for says in [says, file.to_str().unwrap(), "Put the file back", "memlanectl status"] {
            assert!(error.contains(says), "{what}: {says:?} is not said: {error}");
        }
        assert_eq!(fs::read(&file).ok(), bytes, "{what}: it is left as it is");
        assert_ne!(guest.stats().unwrap()["standing"], "running", "{what}");
        assert_ne!(there.stats().unwrap()["standing"], "running", "{what}");
    }

    fs::write(&file, &whole).unwrap();
    stage.rig.start_daemon(HostId::A).unwrap();
    stage.wait_for_standing(HostId::B, "web1", "running");
    assert_runs(&mut there);
    wait_for_exit(guest.process());
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// What it has promised is known, and there is room for more of that.
#[test]
fn a_daemon_starts_with_a_full_disk() {
    let test = "a_daemon_starts_with_a_full_disk";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    let (mut guest, mut there) = committed(&mut stage, &tap);
    // Nobody but this daemon sees the mount.
    let full = r#"cp -a "$1/journal" "$1/kept"
        mount -t tmpfs -o size=192k,mode=0755 tmpfs "$1/journal"
        cp -a "$1/kept/." "$1/journal"
        ! cat /dev/zero > "$1/journal/filled" 2> /dev/null"#;
    stage.rig.start_daemon_after(HostId::A, full).unwrap();
    let pid = stage.rig.daemon(HostId::A).pid();
    let file = PathBuf::from(format!("/proc/{pid}/root{}", journal(&stage, HostId::A).display()));
    let more = fs::write(file.join("more"), [0; 4096]).unwrap_err();
    assert_eq!(more.raw_os_error(), Some(28), "there is room on the disk: {more}");
    stage.wait_for_standing(HostId::B, "web1", "running");
    assert_runs(&mut there);
    wait_for_exit(guest.process());
    wait_for("all of it to be journalled", LONG, || {
        let text = fs::read_to_string(file.join(FILE)).unwrap();
        text.contains("\"record\":null").then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}: {}", stage.rig.daemon(HostId::A).log_tail()));
}

#[test]
fn nobody_else_may_look_into_the_journal() {
    let test = "nobody_else_may_look_into_the_journal";
    let Some(mut stage) = Stage::new(test, LabOptions::default()) else { return };
    let directory = journal(&stage, HostId::A);
    let modes = || {
        let files = fs::read_dir(&directory).unwrap().map(|entry| mode(&entry.unwrap().path()));
        (mode(&directory), files.collect::<Vec<_>>())
    };
    let only_ours = (0o700, vec![0o600; 3]);
    assert_eq!(modes(), only_ours);
    for umask in ["0000", "0777"] {
        stage.rig.stop_daemon(HostId::A).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        stage.rig.start_daemon_after(HostId::A, &format!("umask {umask}")).unwrap();
        assert_eq!(modes(), only_ours, "umask {umask}");
    }
    fs::set_permissions(&directory, Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(directory.join(FILE), Permissions::from_mode(0o644)).unwrap();
    stage.rig.start_daemon(HostId::A).unwrap();
    assert_eq!(modes(), only_ours);
    stage.wait_for_log(HostId::A, "others may no longer look into");
}
