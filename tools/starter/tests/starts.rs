//! The starter as a program: the test plays the daemon, and programs that tell about themselves are started in QEMU's place.

use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;

use memlane_kvm::packet;
use memlane_lab::say_skipped;
use memlane_protocol::wire::starter::{GO, READY, StartRequest};

const USER: u32 = 2_100_000_000;
const GROUP: u32 = 7;

fn request(program: &str, arguments: &[&str]) -> StartRequest {
    StartRequest {
        user: USER,
        groups: vec![GROUP],
        descriptors: 1,
        program: program.into(),
        attach_socket: b"/run/memlane/attach.sock".to_vec(),
        arguments: arguments.iter().map(|argument| argument.as_bytes().to_vec()).collect(),
    }
}

/// Returns what the program has printed, or why the starter did not start it.
fn start(request: &StartRequest) -> Result<String, String> {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut starter = Command::new(env!("CARGO_BIN_EXE_memlane-starter"));
    starter.args(["--users", "2100000000-2100000009", "--shim", "", "--group", "7"]);
    for program in ["/usr/bin/env", "/usr/bin/id", "/nonexistent/qemu"] {
        starter.args(["--qemu", program]);
    }
    starter.env("SECRET", "of the daemon").stdin(OwnedFd::from(theirs));
    let mut starter_process = starter.spawn().unwrap();
    drop(starter);
    let mut log = tempfile::tempfile().unwrap();
    let bytes = request.encode();
    let sent = packet::send_some(&ours, &bytes, &[log.as_fd()]).unwrap();
    ours.write_all(&bytes[sent..]).unwrap();

    let (mut first, mut reason) = ([0], String::new());
    let (_, made) = packet::recv(&ours, &mut first).unwrap();
    if first == [READY] {
        let [made] = <[OwnedFd; 1]>::try_from(made).unwrap();
        let mut connection = UnixStream::from(made);
        connection.write_all(&[GO]).unwrap();
        connection.read_to_string(&mut reason).unwrap();
    } else {
        ours.read_to_string(&mut reason).unwrap();
        reason.insert(0, first[0].into());
    }
    let ended = starter_process.wait().unwrap();
    assert_eq!(ended.success(), reason.is_empty(), "{ended}: {reason}");
    if !reason.is_empty() {
        return Err(reason);
    }
    log.rewind().unwrap();
    let mut printed = String::new();
    log.read_to_string(&mut printed).unwrap();
    Ok(printed)
}

/// Says that `test` is skipped where the starter cannot do its work.
fn skip(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        say_skipped(test, "not root (use sudo)");
    }
    !root
}

#[test]
fn a_program_is_the_guests_user_and_inherits_nothing() {
    if skip("a_program_is_the_guests_user_and_inherits_nothing") {
        return;
    }
    let printed = start(&request("/usr/bin/env", &[])).unwrap();
    let mut variables: Vec<_> = printed.lines().filter_map(|line| line.split('=').next()).collect();
    variables.sort();
    assert_eq!(variables, ["LD_PRELOAD", "MEMLANE_ATTACH_SOCKET", "PATH"]);
    assert_eq!(start(&request("/usr/bin/id", &["-u"])).unwrap().trim(), USER.to_string());
    assert_eq!(start(&request("/usr/bin/id", &["-G"])).unwrap().trim(), format!("{USER} {GROUP}"));
}

#[test]
fn what_is_not_started_is_told() {
    if skip("what_is_not_started_is_told") {
        return;
    }
    for (request, why) in [
        (StartRequest { user: 0, ..request("/usr/bin/id", &[]) }, "this user is not allowed by --users"),
        (StartRequest { groups: vec![0], ..request("/usr/bin/id", &[]) }, "this group is not allowed"),
        (request("/bin/sh", &["-c", "id"]), "this program is not allowed by --qemu"),
        (StartRequest { descriptors: 2, ..request("/usr/bin/id", &[]) }, "1 descriptors came"),
        (request("/nonexistent/qemu", &[]), "cannot start QEMU for user 2100000000"),
    ] {
        let told = start(&request).unwrap_err();
        assert!(told.contains(why), "{told}");
    }
}

#[test]
fn who_is_no_daemon_is_told_what_this_is() {
    let mut starter = Command::new(env!("CARGO_BIN_EXE_memlane-starter"));
    starter.args(["--users", "2100000000-2100000009", "--shim", "/shim.so"]);
    let output = starter.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("standard input is no connection"), "{told}");
}
