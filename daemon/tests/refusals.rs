//! Orders that cannot be carried out are refused with the reason and what to do about it, and
//! the guest notices nothing.

mod common;

use std::process::Command;

use common::{GUEST, LIMITS, LONG, Stage, assert_runs, signal, words};
use memlane_lab::{HostId, LabOptions, wait_for};
use memlane_protocol::wire::control::Control;
use rustix::process::Signal;

#[test]
fn orders_that_make_no_sense() {
    let Some((mut stage, tap)) = Stage::tapped("orders_that_make_no_sense", LabOptions::default()) else {
        return;
    };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");

    stage.assert_refused("web9", &[], &["no guest named web9", "there are: web1"]);
    for command in ["check", "migrate"] {
        let answer = stage.rig.ctl(HostId::A, &[command, "web1", "host-x"]).unwrap();
        assert_eq!(answer.code, 3, "{}", answer.text);
        assert!(
            answer.text.contains("host-x is no peer of this host (there are: host-b)"),
            "{}",
            answer.text
        );
        assert!(answer.text.contains("add it as [[peer]]"), "{}", answer.text);

        // From the host where a VMM only waits for it.
        let answer = stage.rig.ctl(HostId::B, &[command, "web1", "host-a"]).unwrap();
        assert_eq!(answer.code, 3, "{}", answer.text);
        assert!(answer.text.contains("guest web1 does not run here"), "{}", answer.text);

        let answer =
            stage.rig.ctl(HostId::A, &[command, "web1", "host-b", "--downtime-limit", "0s"]).unwrap();
        assert_eq!(answer.code, 2, "{command}: {}", answer.text);
        assert!(answer.text.contains("give it 0.001 to 60"), "{}", answer.text);
    }

    // Already moving: seen from the source, and from the destination.
    tap.hold(HostId::B, |message| *message == Control::HolesDone);
    let first = stage.begin("web1", &[]);
    tap.wait();
    stage.assert_refused("web1", &[], &["web1 is being moved already", "memlanectl watch"]);
    tap.release();
    first.expect(0, &[]);
    common::assert_runs(&mut there);
    drop(guest);

    // A guest of this name is at the destination already.
    guest = stage.guest("web1");
    stage.assert_refused("web1", &[], &["a guest named web1 is here already", "names must be unique"]);
    stage.assert_runs_on("web1", &mut guest);

    stage.rig.stop_daemon(HostId::A).unwrap();
    for command in [&["status"][..], &["check", "web1", "host-b"], &["migrate", "web1", "host-b"]] {
        let answer = stage.rig.ctl(HostId::A, command).unwrap();
        assert_eq!(answer.code, 6, "{}", answer.text);
        assert!(answer.text.contains("memlaned"), "{}", answer.text);
    }
}

/// Whoever ordered it may go away before the guest's move has begun.
#[test]
fn an_order_given_up_before_it_began() {
    let Some((mut stage, tap)) = Stage::tapped("an_order_given_up_before_it_began", LabOptions::default())
    else {
        return;
    };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    tap.hold(HostId::A, |message| matches!(message, Control::Offer(_)));
    let order = stage.begin("web1", &[]);
    tap.wait();
    order.signal(Signal::KILL);
    drop(order);
    tap.lose();
    stage.assert_runs_on("web1", &mut guest);
    stage.assert_moves("web1", &mut there);
}

#[test]
fn a_destination_that_lacks_something() {
    let lab = LabOptions { bridge: true, ..LabOptions::default() };
    let Some(mut stage) = Stage::new("a_destination_that_lacks_something", lab) else { return };
    let mut guest = stage
        .rig
        .start_vmm(HostId::A, "web1", &words(&format!("{GUEST} --nic 52:54:00:12:34:56@lan")))
        .unwrap();

    stage.assert_refused("web1", &[], &["receiver", "no VMM waits for a guest named web1", "--incoming"]);

    let mut there = stage.receiver("web1");
    stage.assert_refused("web1", &["--min-bandwidth", "900gbit"], &["bandwidth", "900gbit", "add ports"]);

    // What is changed on host B, what both commands then say, and how it is changed back.
    let lacks = [
        (
            LIMITS.to_owned(),
            format!("{LIMITS}memory_reserve = \"900TiB\"\n"),
            &["memory", "memory_reserve"][..],
        ),
        ("name = \"port0\"".into(), "name = \"port9\"".into(), &["port0", "no port of this name"]),
        ("name = \"lan\"".into(), "name = \"wan\"".into(), &["network lan is not configured", "[[network]]"]),
        ("bridge = \"br0\"".into(), "bridge = \"br9\"".into(), &["bridge br9", "bring it up"]),
    ];
    for (usual, lacking, why) in lacks {
        stage.reconfigure(HostId::B, |text| text.replace(&usual, &lacking));
        stage.wait_for_standing(HostId::B, "web1", "incoming");
        stage.assert_refused("web1", &[], why);
        stage.reconfigure(HostId::B, |text| text.replace(&lacking, &usual));
        stage.wait_for_standing(HostId::B, "web1", "incoming");
    }

    stage.rig.lab().host(HostId::B).port_down(0).unwrap();
    stage.assert_refused("web1", &[], &["port0"]);
    stage.rig.lab().host(HostId::B).port_up(0).unwrap();

    // A daemon that is not there, and one that does not answer.
    stage.rig.stop_daemon(HostId::B).unwrap();
    stage.assert_refused("web1", &[], &["host-b", "is memlaned running there"]);
    stage.rig.start_daemon(HostId::B).unwrap();
    signal(stage.rig.daemon(HostId::B), Signal::STOP);
    stage.assert_refused("web1", &[], &["host-b", "has not answered"]);
    signal(stage.rig.daemon(HostId::B), Signal::CONT);

    stage.assert_runs_on("web1", &mut guest);
    stage.assert_moves("web1", &mut there);
}

#[test]
fn a_destination_whose_vmm_is_another_machine() {
    let Some(mut stage) = Stage::new("a_destination_whose_vmm_is_another_machine", LabOptions::default())
    else {
        return;
    };
    let mut guest = stage.guest("web1");
    let feature = cpu_feature();
    let narrower = feature.map(|feature| format!("{GUEST} --without-cpuid {feature}"));
    let others = [
        (narrower, feature.unwrap_or_default()),
        (Some(GUEST.replace("--ram 64MiB", "--ram 32MiB")), "0x4000000 bytes"),
        (Some(GUEST.replace("--vcpus 1", "--vcpus 2")), "1 vCPUs"),
        (Some(format!("{GUEST} --guest process")), "kvm"),
    ];
    for (arguments, why) in others {
        let Some(arguments) = arguments else { continue };
        let there =
            stage.rig.start_vmm(HostId::B, "web1", &words(&format!("{arguments} --incoming"))).unwrap();
        stage.assert_refused("web1", &[], &["machine", why]);
        there.quit().unwrap();
        wait_for("the VMM to be gone", common::LONG, || {
            let guests = stage.rig.ctl(HostId::B, &["guests"]).ok()?;
            (!guests.text.contains("web1")).then_some(())
        })
        .unwrap();
    }
    stage.assert_runs_on("web1", &mut guest);
    let mut there = stage.receiver("web1");
    stage.assert_moves("web1", &mut there);
}

/// A feature that this machine's processor has, so that a VMM can be without it.
fn cpu_feature() -> Option<&'static str> {
    let cpuinfo = Command::new("cat").arg("/proc/cpuinfo").output().ok()?;
    let cpuinfo = String::from_utf8_lossy(&cpuinfo.stdout).into_owned();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?.to_owned();
    ["avx2", "avx"].into_iter().find(|feature| flags.split_whitespace().any(|flag| flag == *feature))
}

/// Of a VMM whose process the daemon cannot see, it could not tell whether it lives.
#[test]
fn a_vmm_of_another_pid_namespace_is_refused() {
    let Some(mut stage) = Stage::new("a_vmm_of_another_pid_namespace_is_refused", LabOptions::default())
    else {
        return;
    };
    stage.rig.stop_daemon(HostId::A).unwrap();
    let host = stage.rig.lab().host(HostId::A);
    let mut command = host.command("unshare");
    command.args(["--pid", "--fork", "--kill-child", env!("CARGO_BIN_EXE_memlaned"), "--config"]);
    command.arg(stage.rig.config_file(HostId::A));
    let _daemon = host.spawn("memlaned-apart", command).unwrap();
    let mut vmm = stage.rig.start_vmm_unattended(HostId::A, "web1", &words(GUEST)).unwrap();
    wait_for("the refusal", LONG, || vmm.process().log_tail().contains("pid namespace").then_some(()))
        .unwrap_or_else(|error| panic!("{error}: {}", vmm.process().log_tail()));
    assert!(stage.rig.guest(HostId::A, "web1").unwrap().is_none());
    assert_runs(&mut vmm);
}
