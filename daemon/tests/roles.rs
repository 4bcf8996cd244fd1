//! Operators, viewers and strangers, as processes of users and groups of their own.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use common::{LIMITS, LONG, Stage};
use memlane_lab::{CtlOutput, DaemonUser, HostId, Requirement, RigOptions, wait_for};
use rustix::process::{Gid, Uid};

const ROLES: &str = "[api]\noperators = [\"@64100\", 64101]\nviewers = [\"@64200\"]\n";

/// Users and groups that no host need know.
#[derive(Clone, Copy, Debug)]
struct Who<'a> {
    uid: u32,
    gid: u32,
    groups: &'a [u32],
}

const OPERATOR: Who<'_> = Who { uid: 64_001, gid: 64_100, groups: &[] };
const OPERATOR_BY_SECOND_GROUP: Who<'_> = Who { uid: 64_002, gid: 64_002, groups: &[64_003, 64_100] };
const OPERATOR_BY_NUMBER: Who<'_> = Who { uid: 64_101, gid: 64_101, groups: &[] };
const VIEWER: Who<'_> = Who { uid: 64_004, gid: 64_004, groups: &[64_200] };
const STRANGER: Who<'_> = Who { uid: 64_005, gid: 64_101, groups: &[64_006] };

fn stage(test: &str, tables: &str, daemon_user: DaemonUser) -> Option<Stage> {
    let tables = format!("{LIMITS}{tables}");
    let options = RigOptions { tables, daemon_user, ..RigOptions::default() };
    let stage = Stage::with(test, Requirement::LAB_WITH_KVM, options)?;
    // The lab is for nobody else, but the directory of the sockets is open to all, as /run/memlane is.
    let host = stage.rig.lab().host(HostId::A).directory();
    for directory in [host, host.parent().unwrap()] {
        std::fs::set_permissions(directory, PermissionsExt::from_mode(0o711)).unwrap();
    }
    // Wherever the programs were built, not everybody need have a way there.
    std::fs::copy(stage.rig.ctl_command(HostId::A, &[]).get_program(), program(&stage)).unwrap();
    Some(stage)
}

fn program(stage: &Stage) -> PathBuf {
    stage.rig.lab().host(HostId::A).directory().join("memlanectl")
}

/// Runs `memlanectl` on host A as somebody else.
fn ctl(stage: &Stage, who: Who<'_>, arguments: &[&str]) -> CtlOutput {
    let Who { uid, gid, groups } = who;
    let mut command = stage.rig.lab().host(HostId::A).command("setpriv");
    command.arg(format!("--reuid={uid}")).arg(format!("--regid={gid}"));
    match groups {
        [] => command.arg("--clear-groups"),
        groups => {
            let groups: Vec<_> = groups.iter().map(u32::to_string).collect();
            command.arg(format!("--groups={}", groups.join(",")))
        }
    };
    // Becoming somebody else has the kernel forget with whom to die.
    command.arg("--pdeathsig=KILL").arg(program(stage)).arg("--json");
    command.arg("--socket").arg(stage.rig.api_socket(HostId::A)).args(arguments);
    let output = command.output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let json = stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let text = format!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
    CtlOutput { code: output.status.code().unwrap(), json, text }
}

/// Connects to the API of host A's daemon as somebody else, so many times.
fn connections(stage: &Stage, who: Who<'_>, count: usize) -> Vec<UnixStream> {
    let socket = stage.rig.api_socket(HostId::A);
    let connect = || {
        // Only this thread becomes somebody else: the system calls are not those of the C library.
        let groups: Vec<Gid> = who.groups.iter().copied().map(Gid::from_raw).collect();
        rustix::thread::set_thread_groups(&groups).unwrap();
        rustix::thread::set_thread_gid(Gid::from_raw(who.gid)).unwrap();
        rustix::thread::set_thread_uid(Uid::from_raw(who.uid)).unwrap();
        (0..count).map(|_| UnixStream::connect(&socket).unwrap()).collect()
    };
    std::thread::scope(|scope| scope.spawn(connect).join().unwrap())
}

#[test]
fn who_may_look_looks_and_who_may_order_orders() {
    let test = "who_may_look_looks_and_who_may_order_orders";
    let Some(mut stage) = stage(test, ROLES, DaemonUser::Root) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let looks = [&["status"][..], &["ports"], &["guests"]];
    let orders = [
        &["check", "web1", "host-b"][..],
        &["migrate", "web1", "host-b"],
        &["attach", "--qmp", "/run/web2.qmp", "--name", "web2"],
        &["detach", "web1"],
    ];
    for arguments in looks {
        for who in [OPERATOR, OPERATOR_BY_SECOND_GROUP, OPERATOR_BY_NUMBER, VIEWER] {
            let answer = ctl(&stage, who, arguments);
            assert_eq!(answer.code, 0, "{who:?} {arguments:?}: {}", answer.text);
        }
    }
    for arguments in orders {
        let answer = ctl(&stage, VIEWER, arguments);
        assert_eq!(answer.code, 8, "{arguments:?}: {}", answer.text);
        assert_eq!(answer.last().unwrap()["error"]["code"], "forbidden");
        let why = "user 64004 may look, but not give orders; those who may give orders: root, the daemon's user, \
                   @64100, 64101 (api.operators";
        assert!(answer.text.contains(why), "{}", answer.text);
    }
    for arguments in looks.iter().chain(&orders) {
        let answer = ctl(&stage, STRANGER, arguments);
        assert_eq!(answer.code, 8, "{arguments:?}: {}", answer.text);
        assert!(answer.text.contains("user 64005 may neither look nor give orders"), "{}", answer.text);
        assert!(
            answer.text.contains("@64100, 64101, @64200 (api.operators and api.viewers"),
            "{}",
            answer.text
        );
    }
    for who in [OPERATOR_BY_SECOND_GROUP, OPERATOR_BY_NUMBER] {
        let answer = ctl(&stage, who, &["check", "web1", "host-b", "--min-bandwidth", "1mbit"]);
        assert_eq!(answer.code, 0, "{who:?}: {}", answer.text);
    }
    // All that was refused has begun nothing.
    stage.assert_runs_on("web1", &mut guest);
    let order = ["migrate", "web1", "host-b", "--min-bandwidth", "1mbit", "--downtime-limit", "60s"];
    let answer = ctl(&stage, OPERATOR, &order);
    assert_eq!(answer.code, 0, "{}", answer.text);
    common::assert_runs(&mut there);
    // A viewer may follow what others order, and not take it back.
    let id = answer.last().unwrap()["id"].as_str().unwrap().to_owned();
    let watched = ctl(&stage, VIEWER, &["watch", &id]);
    assert_eq!(watched.code, 0, "{}", watched.text);
    for order in [&["cancel", &id][..], &["abandon", &id]] {
        let answer = ctl(&stage, VIEWER, order);
        assert_eq!(answer.code, 8, "{order:?}: {}", answer.text);
    }
    // One line for all that one user was refused, and one for each order that was taken.
    let log = stage.log(HostId::A);
    for (line, uid) in
        [("refused an order: its user may only look", 64_004), ("may neither look nor order", 64_005)]
    {
        let lines: Vec<_> = log.lines().filter(|text| text.contains(line)).collect();
        assert_eq!(lines.len(), 1, "{log}");
        assert!(lines[0].contains(&format!("uid {uid}")), "{}", lines[0]);
    }
    let ordered = log.lines().find(|line| line.contains("ordered to move a guest")).unwrap();
    assert!(ordered.contains("memlanectl (uid 64001"), "{ordered}");
}

/// As it is shipped: the kernel keeps all others away from the socket.
#[test]
fn without_a_word_the_daemons_group_orders_and_nobody_looks() {
    let test = "without_a_word_the_daemons_group_orders_and_nobody_looks";
    let Some(mut stage) = stage(test, "", DaemonUser::Unit) else { return };
    let daemon = std::os::unix::fs::MetadataExt::gid(&stage.rig.api_socket(HostId::A).metadata().unwrap());
    let _guest = stage.guest("web1");
    let _there = stage.receiver("web1");
    let check = ["check", "web1", "host-b", "--min-bandwidth", "1mbit"];
    for gids in [(daemon, &[][..]), (64_002, &[daemon])] {
        let answer = ctl(&stage, Who { uid: 64_002, gid: gids.0, groups: gids.1 }, &check);
        assert_eq!(answer.code, 0, "{}", answer.text);
    }
    let answer = ctl(&stage, STRANGER, &["status"]);
    assert_eq!(answer.code, 8, "{}", answer.text);
    assert!(answer.text.contains("a member of the socket's group"), "{}", answer.text);
}

/// Returns whether the daemon keeps a connection.
fn is_kept(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    matches!(stream.read(&mut [0; 4096]), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn crowds_of_strangers_and_viewers_leave_operators_room() {
    let test = "crowds_of_strangers_and_viewers_leave_operators_room";
    let Some(mut stage) = stage(test, ROLES, DaemonUser::Root) else { return };
    let assert_served = |stage: &Stage| {
        let answer = ctl(stage, OPERATOR, &["status"]);
        assert_eq!(answer.code, 0, "{}", answer.text);
    };
    // Silent, and talkative: what they say is not even looked at.
    let mut strangers = connections(&stage, STRANGER, 500);
    for stranger in strangers.iter_mut().step_by(2) {
        let _ = stranger.write_all(b"no request at all");
    }
    assert_served(&stage);
    let gone = || strangers.iter_mut().all(|stream| !is_kept(stream)).then_some(());
    wait_for("the end of the strangers' connections", LONG, gone).unwrap();

    let mut viewers = connections(&stage, VIEWER, 300);
    assert_served(&stage);
    let kept = || {
        let kept = viewers.iter_mut().filter_map(|stream| is_kept(stream).then_some(())).count();
        (kept <= 32).then_some(kept)
    };
    // Silence alone ends a connection too, but later than this.
    assert!(wait_for("all but one viewer's share to be gone", Duration::from_secs(5), kept).unwrap() > 0);
    let log = stage.log(HostId::A);
    assert_eq!(log.matches("may neither look nor order").count(), 1, "{log}");
}
