//! Each command of the program against an API that is told what to answer.

mod fake;
mod first_steps;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Output, Stdio};

use fake::Daemon;
use memlane_api::types::{CheckReport, Migration, Outcome};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn command(daemon: &Daemon, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memlanectl"));
    command.arg("--socket").arg(daemon.socket()).args(line.split(' ')).stdin(Stdio::null());
    command
}

/// Exit code, stdout and stderr of a command.
fn run(daemon: &Daemon, line: &str) -> (i32, String, String) {
    of_output(command(daemon, line).output().unwrap())
}

fn of_output(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Starts a command and reads its stdout up to a line that contains `text`.
fn started(daemon: &Daemon, line: &str, text: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = command(daemon, line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut read = String::new();
    while !read.contains(text) {
        read.clear();
        assert!(out.read_line(&mut read).unwrap() > 0, "no line with {text}");
    }
    (child, out)
}

fn interrupt(child: &Child) {
    kill_process(Pid::from_child(child), Signal::INT).unwrap();
}

#[test]
fn status_ports_and_guests_are_shown() {
    let daemon = Daemon::start();
    let (code, out, _) = run(&daemon, "status");
    assert_eq!(code, 0);
    for part in ["host-a\n", "NONE: plain TCP", "host-b (10.0.0.2:7410)", "web0 → host-b: copying"] {
        assert!(out.contains(part), "{part}\n{out}");
    }
    let (_, out, _) = run(&daemon, "ports");
    assert!(out.starts_with("PORT  ADDRESS") && out.contains("10.0 Gbit/s"), "{out}");
    let (_, out, _) = run(&daemon, "guests");
    assert!(out.starts_with("GUEST  STANDING") && out.contains("1.00 GiB"), "{out}");

    assert_eq!(json(&run(&daemon, "--json status").1)["host"], "host-a");
    assert_eq!(json(&run(&daemon, "ports --json").1)[0]["name"], "a");
    assert_eq!(json(&run(&daemon, "guests --json").1)[0]["standing"], "running");
}

/// No daemon is needed for it.
#[test]
fn keys_are_made_and_shown() {
    let directory = tempfile::tempdir().unwrap();
    let keys = |line: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memlanectl"));
        command.current_dir(directory.path()).arg("--socket").arg("/nonexistent").arg("keys");
        of_output(command.args(line.split(' ')).output().unwrap())
    };
    let (code, _, err) = keys("issue host-a --dir ca");
    assert!(code == 1 && err.contains("memlanectl keys init"), "{code} {err}");
    let (code, out, err) = keys("init --dir ca");
    assert!(code == 0 && out.contains("memlanectl keys issue HOST --dir ca"), "{out}{err}");
    let (code, _, err) = keys("init --dir ca");
    assert!(code == 1 && err.contains("is there already; nothing was changed"), "{code} {err}");
    let (code, out, err) = keys("issue host-a --dir ca --days 30");
    assert!(code == 0 && out.contains("ca/host-a") && out.contains("30 days"), "{out}{err}");
    assert_eq!(keys("issue host_/a --dir ca").0, 2);
    let (code, out, err) = keys("show ca/host-a");
    assert_eq!((code, err.as_str()), (0, ""));
    for part in ["the certificate of host-a", "more days", "Memlane authority", "SHA-256"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let shown = json(&keys("show ca/host-a --json").1);
    assert_eq!((&shown[0]["hosts"][0], &shown[0]["signed_by_ca"]), (&"host-a".into(), &true.into()));
    let made = json(&keys("issue host-b --dir ca --out b --json").1);
    assert_eq!((&made["directory"], &made["certificates"][0]["hosts"][0]), (&"b".into(), &"host-b".into()));
    assert_eq!(keys("show nowhere").0, 1);
}

/// Others follow as many migrations as there may be followed: this one is asked about now and then.
#[test]
fn an_order_is_followed_where_no_more_streams_are_to_be_had() {
    let daemon = Daemon::start();
    let request = format!("GET /v1/migrations/{:032x}/events HTTP/1.1\r\nhost: x\r\n\r\n", 0xaaaa);
    let streams: Vec<_> = (0..100)
        .map(|_| {
            let mut stream = std::os::unix::net::UnixStream::connect(daemon.socket()).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            stream
        })
        .collect();
    let (code, out, err) = run(&daemon, "migrate web1 host-b");
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("web1"), "{out}");
    assert_eq!(run(&daemon, "migrate fails1 host-b").0, 4);
    drop(streams);
}

/// Escape sequences, and what turns the direction of text, from wherever the daemon has them.
#[test]
fn nothing_that_is_shown_is_obeyed_by_a_terminal() {
    let daemon = Daemon::start();
    let is_obeyed = |character| character != '\n' && memlane_protocol::wire::is_obeyed(character);
    let (code, out, err) = run(&daemon, "migrate esc1 host-b");
    assert_eq!(code, 3);
    assert!(err.contains("memlanectl: cpu: \u{fffd}[2J") && err.contains("\nmemory: none\n"), "{err:?}");
    assert!(!(out + &err).contains(is_obeyed), "{err:?}");
    let (code, out, err) = run(&daemon, "--json migrate esc1 host-b");
    assert_eq!(code, 3);
    assert!(!(out.clone() + &err).contains(is_obeyed), "{out:?} {err:?}");
    // Programs read what was said.
    let message = json(&out)["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(message, "cpu: \u{1b}[2J\u{9b}m\u{202e}\nmemory: none");
}

#[test]
fn a_qemu_guest_is_launched_and_let_go() {
    let daemon = Daemon::start();
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let qemu1 = file("qemu1.toml", b"name = \"qemu1\"\n");
    let (code, out, err) = run(&daemon, &format!("launch {qemu1}"));
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        out,
        "qemu1 runs\n  process  4711 (qemu of machine type pc-q35-7.2, 1.00 GiB)\n  \
         monitor  /run/memlane/guests/qemu1/qmp.sock\n"
    );
    let (_, out, _) = run(&daemon, "guests");
    assert!(out.contains("MACHINE     QMP\n") && out.contains("pc-q35-7.2  /run/memlane/guests/"), "{out}");
    let (code, out, _) = run(&daemon, "detach qemu1");
    assert_eq!(code, 0);
    assert!(out.starts_with("qemu1 was let go and goes on without the daemon\n  process  4711 "), "{out}");
    let (_, out, _) = run(&daemon, "guests");
    assert!(!out.contains("MACHINE"), "{out}");

    let (code, out, _) = run(&daemon, &format!("launch {qemu1} --incoming --json"));
    assert_eq!((code, json(&out)["standing"].as_str()), (0, Some("incoming")));
    let (code, out, _) = run(&daemon, &format!("launch {}", file("web1.toml", b"name = \"web1\"\n")));
    assert_eq!((code, out.as_str()), (3, ""));
    let (code, _, err) = run(&daemon, &format!("launch {}", file("bad.toml", b"")));
    assert_eq!((code, err.as_str()), (2, "memlanectl: guest file:1: name is missing\n"));
    let long = file("long.toml", &b"#".repeat((64 << 10) + 1));
    let missing = "/no/such/web1.toml";
    for (file, why) in [
        (&long, "more than 65536 bytes"),
        (&file("bytes", b"\xff"), "UTF-8"),
        (&missing.to_owned(), "No such"),
    ] {
        let (code, _, err) = run(&daemon, &format!("launch {file}"));
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(&format!("cannot read the guest file {file}: ")) && err.contains(why), "{err}");
    }
}

#[test]
fn a_qemu_guest_of_others_is_attached_and_let_go() {
    let daemon = Daemon::start();
    let (code, out, _) = run(&daemon, "attach --qmp web2.qmp --name web2");
    let here = std::env::current_dir().unwrap();
    assert_eq!(code, 0);
    assert!(out.starts_with("web2 is attached\n"), "{out}");
    assert!(out.contains(&format!("  monitor  {}/web2.qmp\n", here.display())), "{out}");
    let (code, out, _) = run(&daemon, "attach --qmp /run/web3.qmp --name web3 --incoming");
    assert_eq!(code, 0);
    assert!(out.starts_with("web3 waits to arrive from another host\n"), "{out}");
    let (code, out, _) = run(&daemon, "detach web2 --json");
    assert_eq!((code, json(&out)["name"].as_str()), (0, Some("web2")));

    let (code, out, err) = run(&daemon, "attach --qmp /run/web1.qmp --name web1 --json");
    assert_eq!((code, err.as_str()), (3, "memlanectl: there is a guest web1\n"));
    assert_eq!(json(&out)["error"]["code"], "cannot_attach");
    assert_eq!(run(&daemon, "attach --qmp /run/web1.qmp --name ../web1").0, 2);
    let (code, out, _) = run(&daemon, "attach --name web4");
    assert_eq!(code, 0);
    assert!(out.contains("  monitor  /run/memlane-qemu/web4.sock\n"), "{out}");
    for (name, why) in [("web1", "attached by itself"), ("web2", "no guest web2"), ("a/b", "no guest")] {
        let (code, _, err) = run(&daemon, &format!("detach {name}"));
        assert_eq!(code, 3, "{err}");
        assert!(err.contains(why), "{err}");
    }
}

#[test]
fn check_tells_what_was_found() {
    let daemon = Daemon::start();
    let (code, out, _) = run(&daemon, "check web1 host-b");
    assert_eq!(code, 0);
    assert!(out.starts_with("web1 can move to host-b."), "{out}");
    let (code, out, _) = run(&daemon, "check big1 host-b");
    assert_eq!(code, 3);
    assert!(out.contains("REFUSED  memory: too little"), "{out}");
    let (code, out, _) = run(&daemon, "check big1 host-b --json");
    let report: CheckReport = serde_json::from_str(&out).unwrap();
    assert_eq!((code, report.ok), (3, false));
    let (code, _, err) = run(&daemon, "check nobody host-b");
    assert_eq!((code, err.as_str()), (3, "memlanectl: no guest nobody is attached\n"));
}

#[test]
fn a_migration_is_followed_to_its_end() {
    let daemon = Daemon::start();
    let (code, out, err) = run(&daemon, "migrate web1 host-b --downtime-limit 50ms --verify");
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "web1 → host-b: preflight, downtime limit 50.0 ms");
    assert!(out.contains("\nweb1 runs at host-b.\n  total "), "{out}");
    assert!(out.contains("downtime  8.00 ms (predicted 9.00 ms, limit 50.0 ms)"), "{out}");
    assert!(out.contains("port a    ██████████"), "{out}");

    let (code, out, err) = run(&daemon, "migrate web1 host-b --json");
    assert_eq!((code, err.as_str()), (0, ""));
    let ended: Migration = serde_json::from_str(&out).unwrap();
    assert_eq!((ended.outcome, out.lines().count()), (Some(Outcome::Completed), 1));
}

#[test]
fn exit_codes_tell_how_it_ended() {
    let daemon = Daemon::start();
    let (code, out, err) = run(&daemon, "migrate big1 host-b --json");
    assert_eq!((code, err.as_str()), (3, "memlanectl: too little memory at host-b\n"));
    assert_eq!(json(&out)["error"]["code"], "refused");
    let (code, out, _) = run(&daemon, "migrate fails1 host-b");
    assert_eq!(code, 4);
    assert!(
        out.contains("fails1 was not moved: it runs on at host-a.\n  why       host-b went away"),
        "{out}"
    );
    let (code, out, _) = run(&daemon, "migrate cancelled1 host-b");
    assert_eq!(code, 5);
    assert!(out.contains("the order was cancelled: it runs on at host-a"), "{out}");
    let (code, out, err) = run(&daemon, "migrate not-yours host-b --json");
    assert_eq!((code, err.as_str()), (8, "memlanectl: user 1000 may look, but not give orders\n"));
    assert_eq!(json(&out)["error"]["code"], "forbidden");
    // Its events end without an outcome.
    let (code, _, err) = run(&daemon, "migrate dies1 host-b");
    assert_eq!(code, 6);
    assert!(err.contains("lost the daemon on") && err.contains("journalctl -u memlaned"), "{err}");

    for wrong in ["migrate web1", "migrate web1 host-b --downtime-limit 300", "fly", "watch nobody"] {
        assert_eq!(run(&daemon, wrong).0, 2, "{wrong}");
    }
    let nowhere = ["--socket", "/no/such/api.sock", "status"];
    let output = Command::new(env!("CARGO_BIN_EXE_memlanectl")).args(nowhere).output().unwrap();
    let (code, _, err) = of_output(output);
    assert_eq!(code, 6);
    assert!(err.contains("/no/such/api.sock") && err.contains("systemctl status memlaned"), "{err}");
}

#[test]
fn a_detached_migration_is_watched_and_cancelled() {
    let daemon = Daemon::start();
    let (code, out, _) = run(&daemon, "migrate waits1 host-b --detach");
    assert_eq!(code, 0);
    assert!(out.starts_with("waits1 → host-b: begun, migration "), "{out}");
    let id = out.trim().rsplit(' ').next().unwrap();

    let (mut child, mut out) = started(&daemon, "watch waits1 --json", "copying");
    // Two are under way: the daemon's own web0, and this one.
    let (code, _, err) = run(&daemon, "watch");
    assert!(
        code == 2 && err.contains("several migrations are under way") && err.contains(id),
        "{code} {err}"
    );
    let (code, text, _) = run(&daemon, &format!("cancel {}", &id[..8]));
    assert!(code == 0 && text.contains("asked to cancel"), "{code} {text}");
    let mut last = String::new();
    while out.read_line(&mut last).unwrap() > 0 {
        let event: Migration = serde_json::from_str(last.trim()).unwrap();
        assert_eq!(event.id, id);
        if event.outcome.is_some() {
            assert_eq!(event.outcome, Some(Outcome::Cancelled));
            break;
        }
        last.clear();
    }
    assert_eq!(child.wait().unwrap().code(), Some(5));
    // One that has ended is told once more.
    assert_eq!(run(&daemon, "watch waits1").0, 5);
}

#[test]
fn it_is_too_late_to_cancel_after_switchover() {
    let daemon = Daemon::start();
    run(&daemon, "migrate late1 host-b --detach");
    let (code, out, err) = run(&daemon, "cancel late1 --json");
    assert_eq!((code, err.as_str()), (3, "memlanectl: late1 has switched over\n"));
    assert_eq!(json(&out)["error"]["code"], "too_late");
}

#[test]
fn what_is_in_doubt_is_resolved_only_by_who_means_it() {
    let daemon = Daemon::start();
    run(&daemon, "migrate late1 host-b --detach");
    run(&daemon, "migrate waits1 host-b --detach");
    let resolve = |words: &str| run(&daemon, &format!("resolve {words}"));
    for (words, why) in [
        ("late1 --run-here --yes", "--other-host-is-off"),
        ("late1 --other-host-is-off --yes", "<--run-here|--discard>"),
        ("late1 --run-here --discard --other-host-is-off --yes", "cannot be used with"),
        ("late1 --discard", "give --yes if it is meant"),
    ] {
        let (code, _, err) = resolve(words);
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(why), "{err}");
    }
    let (code, _, err) = resolve("waits1 --discard --yes");
    assert_eq!((code, err.as_str()), (3, "memlanectl: it is not in doubt\n"));
    let (code, out, err) = resolve("late1 --run-here --other-host-is-off --yes");
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("late1: decided; memlanectl watch "), "{out}");
}

#[test]
fn the_first_interrupt_cancels_and_waits() {
    let daemon = Daemon::start();
    let (mut child, mut out) = started(&daemon, "migrate waits1 host-b", "waits1 → host-b");
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(5));
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut out, &mut rest).unwrap();
    assert!(rest.contains("the order was cancelled: it runs on at host-a"), "{rest}");
}

#[test]
fn the_second_interrupt_leaves_and_the_migration_goes_on() {
    let daemon = Daemon::start();
    let (mut child, _out) = started(&daemon, "migrate late1 host-b", "late1 → host-b");
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    interrupt(&child);
    err.read_line(&mut line).unwrap();
    assert_eq!(line, "cannot cancel: late1 has switched over\n");
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    line.clear();
    err.read_line(&mut line).unwrap();
    assert!(line.contains("the migration goes on"), "{line}");
    assert!(daemon.is_under_way("late1"));
}

#[test]
fn an_interrupt_during_the_preflight_cancels_what_it_begins() {
    let daemon = Daemon::start();
    let mut child = command(&daemon, "migrate slow1 host-b")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    daemon.wait_for_preflight();
    interrupt(&child);
    let mut line = String::new();
    BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "memlanectl: will cancel as soon as the preflight is done\n");
    daemon.end_preflight();
    assert_eq!(child.wait().unwrap().code(), Some(5));
}

#[test]
fn help_gets_one_going() {
    let output = Command::new(env!("CARGO_BIN_EXE_memlanectl")).arg("--help").output().unwrap();
    let (code, out, _) = of_output(output);
    assert_eq!(code, 0);
    for part in
        ["memlanectl migrate web1 host-b", "Exit codes:", "refused", "cancelled", "/run/memlane/api.sock"]
    {
        assert!(out.contains(part), "{part}\n{out}");
    }
}

#[test]
fn help_of_launch_and_attach_shows_what_they_need() {
    for (command, parts) in [
        ("launch", ["memory = \"2GiB\"", "[[nic]]", "ip tuntap add", "may_start_guests"]),
        ("attach", ["share=on", "LD_PRELOAD=", "MEMLANE_ATTACH_SOCKET=", "attach_users"]),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_memlanectl")).args([command, "--help"]).output();
        let (code, out, _) = of_output(output.unwrap());
        assert_eq!(code, 0);
        for part in parts {
            assert!(out.contains(part), "{part}\n{out}");
        }
    }
}
