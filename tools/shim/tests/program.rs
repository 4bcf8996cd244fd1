//! A plain program with the shim in it: what the daemon gets of it, and that nothing else changes.

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use common::{Built, Connection, Daemon, LONG, Memory, RamFile, Running, VARIABLE, device, preload};
use memlane_lab::wait_for;
use memlane_protocol::wire::attach::{Request, ToVmm, VERSIONS};

const PAGES: u64 = 600;

/// The example program `writer`.
struct Writer {
    program: Running,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Writer {
    fn start(file: &RamFile, socket: &Path) -> Self {
        let mut command = Command::new(&Built::get().writer);
        preload(&mut command, socket).arg(file.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut writer = Self { program: Running(child), orders, answers: BufReader::new(answers) };
        assert_eq!(writer.answer(), "mapped");
        writer
    }

    fn pid(&self) -> u32 {
        self.program.pid()
    }

    fn write(&mut self, page: u64) {
        writeln!(self.orders, "{page}").unwrap();
        assert_eq!(self.answer(), page.to_string());
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Numbers of the program's open descriptors.
    fn descriptors(&self) -> BTreeSet<String> {
        let listing = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        listing.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

#[test]
fn the_daemon_sees_which_pages_are_written() {
    let Some(device) = device("the_daemon_sees_which_pages_are_written") else { return };
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::new(&directory.path().join("attach.sock"));
    let file = RamFile::new(PAGES);
    let mut writer = Writer::start(&file, &directory.path().join("attach.sock"));
    let connection = daemon.welcome(writer.pid());
    writer.write(3);

    let memory = Memory::find(connection.open_userfault(Some(&device)).unwrap(), &file);
    let protection = memory.protect();
    assert_eq!(memory.written(), BTreeSet::new());
    // One that was there, two that were not, and the last.
    for page in [3, 4, 100, PAGES - 1] {
        writer.write(page);
    }
    assert_eq!(memory.written(), BTreeSet::from([3, 4, 100, PAGES - 1]));
    // The shim has kept nothing: without the daemon's descriptors the protection is gone.
    let handles = connection.open_userfault(Some(&device)).unwrap();
    drop((protection, memory));
    let memory = Memory::find(handles, &file);
    // A program that another test is about to start may have them for a moment.
    let lifted = || (memory.written().len() as u64 == PAGES).then_some(());
    wait_for("the end of the protection", LONG, lifted).unwrap();
    // And the next daemon can begin again.
    let _protection = memory.protect();
    assert_eq!(memory.written(), BTreeSet::new());
    writer.write(5);
    assert_eq!(memory.written(), BTreeSet::from([5]));
}

/// Protection outlives a daemon that wanted a copy kept, up to the next request.
#[test]
fn a_copy_is_kept_where_the_daemon_wants_it() {
    let Some(device) = device("a_copy_is_kept_where_the_daemon_wants_it") else { return };
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::new(&directory.path().join("attach.sock"));
    let file = RamFile::new(PAGES);
    let mut writer = Writer::start(&file, &directory.path().join("attach.sock"));
    let connection = daemon.welcome(writer.pid());
    writer.write(3);

    let memory = Memory::find(connection.keep_userfault(&device), &file);
    drop(memory.protect());
    let observer = File::open(format!("/proc/{}/pagemap", writer.pid())).unwrap();
    let memory = memory.without_userfault(observer);
    drop(connection);
    let connection = daemon.welcome(writer.pid());
    assert_eq!(memory.written(), BTreeSet::new());
    writer.write(4);
    assert_eq!(memory.written(), BTreeSet::from([4]));
    // Asked again, it lets go of that.
    let handles = connection.open_userfault(Some(&device)).unwrap();
    let lifted = || (memory.written().len() as u64 == PAGES).then_some(());
    wait_for("the end of the protection", LONG, lifted).unwrap();
    let memory = Memory::find(handles, &file);
    let _protection = memory.protect();
    assert_eq!(memory.written(), BTreeSet::new());
}

/// Without a descriptor of the daemon's the program's own rights count.
#[test]
fn a_program_with_rights_needs_no_device() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("attach.sock");
    let daemon = Daemon::new(&socket);
    let writer = Writer::start(&RamFile::new(1), &socket);
    let connection = daemon.welcome(writer.pid());
    match connection.open_userfault(None) {
        Ok(_) => {}
        Err(reason) if rustix::process::geteuid().is_root() => panic!("{reason}"),
        Err(reason) => assert!(reason.contains("making a userfaultfd"), "{reason}"),
    }
    // What is no /dev/userfaultfd makes none.
    let reason = connection.open_userfault(Some(&File::open("/dev/null").unwrap())).err().unwrap();
    assert!(reason.starts_with("making a userfaultfd: "), "{reason}");
    // The connection goes on.
    assert!(
        connection.ask(Request::OpenUserfault { keep: false }, &[]).0.is_ok()
            == connection.open_userfault(None).is_ok()
    );
}

#[test]
fn whatever_else_a_daemon_says_does_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("attach.sock");
    let daemon = Daemon::new(&socket);
    let file = RamFile::new(PAGES);
    let mut writer = Writer::start(&file, &socket);
    let null = File::open("/dev/null").unwrap();

    let connection = daemon.welcome(writer.pid());
    for descriptors in [&[][..], &[null.as_fd()], &[null.as_fd(); 20]] {
        let (outcome, given) = connection.ask(Request::Resume, descriptors);
        assert!(outcome.unwrap_err().contains("knows nothing of that") && given.is_empty());
    }
    // Nonsense, a packet for the other side, one that is too long, a wrong version, and a refusal:
    // the shim hangs up and comes again.
    let request = ToVmm::Request { id: 1, request: Request::OpenUserfault { keep: false } }.encode();
    let nonsense = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 20_000],
        ToVmm::Welcome { version: VERSIONS.1 + 1 }.encode(),
        request[..11].to_vec(),
    ];
    let mut connection = connection;
    for packet in nonsense {
        memlane_kvm::packet::send(connection.socket(), &packet, &[null.as_fd()]).unwrap();
        assert_eq!(connection.receive().map(|(message, _)| message), None);
        connection = daemon.welcome(writer.pid());
    }
    drop(connection);
    // A request before the welcome, and a refusal.
    let unwelcome: [ToVmm; 2] = [
        ToVmm::Request { id: 1, request: Request::OpenUserfault { keep: false } },
        ToVmm::Refused { reason: "not you".into() },
    ];
    for message in unwelcome {
        let connection = daemon.accept(writer.pid());
        connection.send(&message, &[]);
        assert_eq!(connection.receive().map(|(message, _)| message), None);
    }
    assert!(daemon.welcome(writer.pid()).ask(Request::Harvest, &[]).0.is_err());
    writer.write(1);
}

#[test]
fn it_comes_back_to_a_daemon_that_went_away() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("attach.sock");
    let file = RamFile::new(PAGES);
    // No daemon yet.
    let mut writer = Writer::start(&file, &socket);
    writer.write(0);
    let asks = |connection: &Connection| assert!(connection.ask(Request::Resume, &[]).0.is_err());
    for _ in 0..2 {
        let daemon = Daemon::new(&socket);
        let connection = daemon.welcome(writer.pid());
        asks(&connection);
        drop((connection, daemon));
        writer.write(1);
    }
}

#[test]
fn the_program_has_no_descriptors_of_the_shim() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("attach.sock");
    let daemon = Daemon::new(&socket);
    let file = RamFile::new(1);
    let writer = Writer::start(&file, &socket);
    let before = writer.descriptors();
    let connection = daemon.welcome(writer.pid());
    let null = File::open("/dev/null").unwrap();
    assert!(connection.ask(Request::Resume, &[null.as_fd()]).0.is_err());
    let _ = connection.open_userfault(None);
    assert_eq!(writer.descriptors(), before);
    // The program's own copies of stdin and so on are not kept open by the shim either: it ends
    // with its input, and whoever reads its output sees the end.
    let Writer { mut program, orders, mut answers } = writer;
    drop(orders);
    let mut rest = String::new();
    assert_eq!(answers.read_line(&mut rest).unwrap(), 0, "{rest}");
    assert!(program.0.wait().unwrap().success());
    assert_eq!(connection.receive().map(|(message, _)| message), None, "ends with the program");
}

#[test]
fn signals_of_the_program_never_reach_the_thread() {
    let directory = tempfile::tempdir().unwrap();
    let writer = Writer::start(&RamFile::new(1), &directory.path().join("attach.sock"));
    let blocked = |directory: &Path| {
        let status = std::fs::read_to_string(directory.join("status")).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap().trim().to_owned();
        u64::from_str_radix(&mask, 16).unwrap()
    };
    let is_shim = |task: &PathBuf| std::fs::read_to_string(task.join("comm")).unwrap() == "memlane-shim\n";
    let inherited = blocked(Path::new("/proc/thread-self"));
    // The thread gives itself its name, and the program's own gets its signals back, a moment after the
    // program has begun to answer.
    let found = wait_for("the shim's thread beside the program's own, which has its signals", LONG, || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", writer.pid())).unwrap();
        let (shim, own): (Vec<_>, Vec<_>) = tasks.map(|task| task.unwrap().path()).partition(is_shim);
        (shim.len() == 1 && own.len() == 1 && blocked(&own[0]) == inherited).then_some(shim)
    });
    let shim = found.unwrap();
    // All but those that cannot be blocked, and the two that the C library keeps for itself.
    let unblocked = [libc::SIGKILL, libc::SIGSTOP, 32, 33].map(|signal| 1u64 << (signal - 1));
    assert_eq!(blocked(&shim[0]), !unblocked.iter().sum::<u64>());
}

#[test]
fn without_the_variable_nothing_is_done() {
    let threads = |command: &mut Command| {
        let output = command.args(["Threads", "/proc/self/status"]).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().replace("Threads:", "").trim().to_owned()
    };
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("attach.sock");
    let daemon = Daemon::new(&socket);
    assert_eq!(threads(preload(&mut Command::new("grep"), &socket)), "2");
    drop(daemon);
    let daemon = Daemon::new(&socket);
    assert_eq!(threads(preload(&mut Command::new("grep"), &socket).env_remove(VARIABLE)), "1");
    for no_socket in ["", &"x".repeat(108)] {
        assert_eq!(threads(preload(&mut Command::new("grep"), Path::new(no_socket))), "1");
    }
    assert!(!daemon.has_caller());
}

/// Programs that run others, with a daemon that never answers, with none, and without the shim.
#[test]
fn children_are_unharmed() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("attach.sock");
    let commands: [&[&str]; 6] = [
        &["/bin/true"],
        &["/bin/false"],
        &["/bin/sh", "-c", "echo out; echo err >&2; exit 3"],
        &["/bin/sh", "-c", "for i in 1 2 3; do (echo $i; /bin/echo $i | cat); done; ls /proc/self/fd"],
        &["/bin/sh", "-c", "trap 'echo trapped' TERM; kill -TERM $$; echo on; kill -KILL $$"],
        &["/bin/sh", "-c", "sleep 0.1 & wait $!; exec /bin/sh -c 'echo $0' again"],
    ];
    for arguments in commands {
        let mut plain = Command::new(arguments[0]);
        let expected = plain.args(&arguments[1..]).output().unwrap();
        for daemon in [Some(Daemon::new(&socket)), None] {
            let mut command = Command::new(arguments[0]);
            let found = preload(&mut command, &socket).args(&arguments[1..]).output().unwrap();
            assert_eq!(found, expected, "{arguments:?}, daemon: {}", daemon.is_some());
        }
    }
}

/// With a filter that forbids a shim all that it needs, one by one.
#[test]
fn a_program_that_may_do_little_does_it_as_ever() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("attach.sock");
    let _daemon = Daemon::new(&socket);
    let forbidden: [&[i64]; 5] = [
        &[libc::SYS_socket],
        &[libc::SYS_connect],
        &[libc::SYS_clone, libc::SYS_clone3],
        &[libc::SYS_close_range],
        &[libc::SYS_rt_sigprocmask],
    ];
    for calls in forbidden {
        let mut command = Command::new("/bin/sh");
        preload(&mut command, &socket).args(["-c", "echo out; echo err >&2; exit 3"]);
        common::forbid(&mut command, calls);
        let output = command.output().unwrap();
        let seen = (output.status.code(), output.stdout.as_slice(), output.stderr.as_slice());
        assert_eq!(seen, (Some(3), &b"out\n"[..], &b"err\n"[..]), "{calls:?}");
    }
}
