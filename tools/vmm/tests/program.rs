//! The program itself: what it says to wrong flags, and how it ends.

use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use memlane_vmm::control::ControlClient;
use memlane_vmm::statistics::GuestProgress;

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_memlane-vmm"))
}

#[test]
fn wrong_flags_are_explained() {
    for (flags, words) in [
        ("--ram 1XB", "KiB, MiB, GiB or TiB"),
        ("--ram 3000000", "multiple of 2MiB"),
        ("--ram 2MiB", "at least 4MiB"),
        ("--ram 64MiB --working-set 63MiB", "leave 2MiB of RAM to the system"),
        ("--ram 64MiB --working-set 1000", "whole pages"),
        ("--ram 64MiB --vcpus 9", "1 to 8 vCPUs"),
        ("--vcpus 0 --guest process", "1 to 8 vCPUs"),
        ("--vcpus 2 --readers 2", "at least one vCPU must write"),
        ("--guest process --tracker log", "use pagemap"),
        ("--tracker magic", "pagemap"),
        ("--pattern random", "hot-cold"),
        ("--fill zero=50", "50 percent"),
        ("--flat-out --rate 5", "cannot be used with"),
        ("--nic 52:54:00:12:34@br0", "no MAC address"),
        ("--nic 52:54:00:12:34:56", "MAC@NETWORK"),
        ("--without-cpuid avx3", "avx3"),
        ("--name a/b", "a/b"),
        ("--incoming", "--attach"),
        ("--backing memory", "slash"),
        ("--backing /nowhere/at/all", "/nowhere/at/all"),
    ] {
        let output = program().args(flags.split(' ')).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{flags}");
        assert!(text.contains(words), "{flags}: {words:?} is not in {text}");
    }
}

#[test]
fn it_runs_until_it_is_told_to_quit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let mut child = program()
        .args(["--guest", "process", "--ram", "16MiB", "--rate", "5000", "--vcpus", "2", "--readers", "1"])
        .arg("--control")
        .arg(&path)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let since = Instant::now();
    let mut client = loop {
        if let Ok(client) = ControlClient::connect(&path) {
            break client;
        }
        if child.try_wait().unwrap().is_some() {
            let output = child.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(text.contains("is not available here"), "{text}");
            memlane_lab::say_skipped("it_runs_until_it_is_told_to_quit", &text.to_string());
            return;
        }
        assert!(since.elapsed() < Duration::from_secs(60), "the control socket does not appear");
        sleep(Duration::from_millis(10));
    };
    assert!(client.verify().unwrap().equal);
    let stats = client.stats().unwrap();
    assert_eq!((stats.steps.len(), stats.reads.len()), (1, 1));
    let followed = ControlClient::connect(&path).unwrap().follow(Duration::from_millis(5)).unwrap();
    let seen: Vec<GuestProgress> = followed.take(20).collect::<Result<_, _>>().unwrap();
    assert!(seen.is_sorted_by(|one, next| one.realtime_ns < next.realtime_ns && one.steps <= next.steps));
    assert!(seen[19].reads > seen[0].reads, "{seen:?}");
    client.quit().unwrap();
    assert!(child.wait().unwrap().success());
    assert!(!path.exists(), "the control socket is removed");
}
