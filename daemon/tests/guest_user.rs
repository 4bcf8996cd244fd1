//! Guests that the daemon starts: each QEMU is a user of its own, and who breaks out of one reaches nothing of the
//! others, nor of the daemon.

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{LIMITS, Stage, words};
use memlane_kvm::packet;
use memlane_lab::{
    CtlOutput, DaemonUser, HostId, LabHost, LabOptions, Requirement, RigOptions, qemu, say_skipped,
};
use memlane_protocol::wire::attach::{FromVmm, MAX_PACKET_BYTES, RunState, ToVmm, VERSIONS, VmmHello};
use memlane_protocol::wire::machine::{GuestShape, Machine, Region, TrackerKind};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use rustix::process::{Gid, Pid, Uid, test_kill_process};

/// Users of guests, as the daemon has them without a word in its configuration.
const FIRST: u32 = 2_100_000_000;
const LAST: u32 = 2_100_065_535;
/// A guest without a disk, which finds nothing to boot from.
const SMALL: &str = "-accel tcg -nodefaults -no-user-config -display none -machine pc-q35-7.2 -cpu Nehalem";

fn stage(test: &str, daemon_user: DaemonUser) -> Option<Stage> {
    let lab = LabOptions { bridge: true, ..LabOptions::default() };
    let options = RigOptions {
        lab,
        tables: LIMITS.into(),
        may_start_guests: true,
        daemon_user,
        ..RigOptions::default()
    };
    Stage::with(test, Requirement::LAB_WITH_QEMU, options)
}

/// Starts a guest on host A; `more` are further keys and tables of its file, and `arguments` are for QEMU.
fn launch(stage: &Stage, name: &str, arguments: &str, more: &str) -> CtlOutput {
    let host = stage.rig.lab().host(HostId::A);
    let arguments = serde_json::Value::from(words(&format!("{SMALL} {arguments}")));
    let qemu = host.qemu();
    let text = format!(
        "name = \"{name}\"\nmemory = \"64MiB\"\nqemu = \"{}\"\narguments = {arguments}\n{more}\n",
        qemu.display()
    );
    let file = host.directory().join(format!("{name}.toml"));
    fs::write(&file, text).unwrap();
    stage.rig.ctl(HostId::A, &["launch", file.to_str().unwrap()]).unwrap()
}

#[track_caller]
fn launched(stage: &Stage, name: &str, more: &str) -> u32 {
    let answer = launch(stage, name, "", more);
    assert_eq!(answer.code, 0, "{}", answer.text);
    stage.qemu(HostId::A, name)
}

#[track_caller]
fn assert_refused(answer: &CtlOutput, why: &[&str]) {
    assert_eq!(answer.code, 3, "{}", answer.text);
    for why in why {
        assert!(answer.text.contains(why), "{why:?} is not said: {}", answer.text);
    }
}

/// What /proc/PID/status says under a heading.
fn status(pid: u32, heading: &str) -> Vec<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(heading)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("{heading} in {status}")).split_whitespace().map(str::to_owned).collect()
}

/// The user that a QEMU runs as, who is one for guests, with no rights at all.
#[track_caller]
fn assert_has_no_rights(pid: u32) -> u32 {
    let user: u32 = status(pid, "Uid")[0].parse().unwrap();
    assert!((FIRST..=LAST).contains(&user), "{user}");
    let user_text = user.to_string();
    for heading in ["Uid", "Gid"] {
        assert!(status(pid, heading).iter().all(|id| *id == user_text), "{:?}", status(pid, heading));
    }
    // None has a group kvm in a lab, unless the machine has it.
    assert!(!status(pid, "Groups").contains(&"0".to_owned()));
    for heading in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status(pid, heading), ["0000000000000000"], "{heading}");
    }
    assert_eq!((status(pid, "NoNewPrivs"), status(pid, "Seccomp")), (words("1"), words("2")));
    let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    let names = environment.split('\0').filter_map(|entry| Some(entry.split_once('=')?.0));
    assert_eq!(
        names.collect::<BTreeSet<_>>(),
        BTreeSet::from(["PATH", "LD_PRELOAD", "MEMLANE_ATTACH_SOCKET"])
    );
    user
}

/// Does something inside a host as a user with no group but its own: all that a QEMU may do whose guest has broken out.
/// Credentials are those of a thread, as far as the kernel is concerned.
fn as_user<T: Send>(host: &LabHost, user: u32, work: impl FnOnce() -> T + Send) -> T {
    let become_and_work = || {
        let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
        rustix::thread::set_thread_groups(&[]).unwrap();
        rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        work()
    };
    host.run_in(become_and_work).unwrap()
}

/// Tries to open a file, or to connect to a socket.
fn reach(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path)?.file_type() {
        kind if kind.is_socket() => UnixStream::connect(path).map(drop),
        kind if kind.is_dir() => fs::read_dir(path).map(drop),
        _ => File::options().read(true).open(path).map(drop),
    }
}

/// Everything that a guest must not reach: the daemon's, and another guest's.
fn secrets(host: &LabHost, other: &str, pid: u32) -> Vec<PathBuf> {
    let (directory, memory) = (host.directory(), host.memory_directory());
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let guest = directory.join("guests").join(other);
    let journal = fs::read_dir(directory.join("journal")).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = journal.collect();
    assert!(paths.iter().any(|path| path.ends_with("handover.jsonl")), "{paths:?}");
    paths.extend(["journal", "api.sock", "host.key"].map(|name| directory.join(name)));
    paths.extend([memory.to_owned(), memory.join(format!("{other}.ram"))]);
    paths.extend([guest.clone(), guest.join("qmp.sock"), guest.join("qemu.log")]);
    paths.extend(["mem", "environ", "maps", "pagemap", "fd", "fd/4"].map(|name| proc.join(name)));
    paths
}

#[test]
fn a_guest_that_breaks_out_reaches_nothing() {
    let Some(mut stage) = stage("a_guest_that_breaks_out_reaches_nothing", DaemonUser::Root) else { return };
    let [one, two] = ["web1", "web2"].map(|name| launched(&stage, name, ""));
    let users = [one, two].map(assert_has_no_rights);
    assert_ne!(users[0], users[1], "each has a user of its own");
    assert_reaches_nothing(&stage, users[0], ("web2", two));
    assert_reaches_nothing(&stage, users[1], ("web1", one));

    // Its user may not attach: not as a guest's VMM, and not as the shim in another process.
    let host = stage.rig.lab().host(HostId::A);
    let (oldest, newest) = VERSIONS;
    for greeting in [FromVmm::Hello(hello("web3")), FromVmm::Shim { oldest, newest }] {
        let told = as_user(host, users[0], || greet(host, &greeting));
        let ToVmm::Refused { reason } = told else { panic!("{told:?}") };
        assert!(reason.contains("is that of a guest, and this process is not"), "{reason}");
    }
    // That is not for want of a place to knock at.
    let told = greet(host, &FromVmm::Shim { oldest, newest });
    assert_eq!(told, ToVmm::Welcome { version: newest });

    // The daemon is started anew, and finds both as they are.
    stage.rig.start_daemon(HostId::A).unwrap();
    for (name, pid, user) in [("web1", one, users[0]), ("web2", two, users[1])] {
        stage.wait_for_standing(HostId::A, name, "running");
        assert_eq!((stage.qemu(HostId::A, name), assert_has_no_rights(pid)), (pid, user));
    }
    let more = format!("user = {}", users[0]);
    assert_refused(&launch(&stage, "web3", "", &more), &[&users[0].to_string(), "is that of another guest"]);
    let third = launched(&stage, "web3", "");
    assert!(!users.contains(&assert_has_no_rights(third)));
    // It is let go of and taken in again: it is still the daemon's own.
    let answer = stage.rig.ctl(HostId::A, &["detach", "web3"]).unwrap();
    assert_eq!(answer.code, 0, "{}", answer.text);
    stage.wait_for_absence(HostId::A, "web3");
    let monitor = stage.rig.lab().host(HostId::A).directory().join("guests/web3/qmp.sock");
    let words = ["attach", "--name", "web3", "--qmp", monitor.to_str().unwrap()];
    let answer = stage.rig.ctl(HostId::A, &words).unwrap();
    assert_eq!(answer.code, 0, "{}", answer.text);
    stage.wait_for_standing(HostId::A, "web3", "running");
    let answer = stage.rig.ctl(HostId::A, &["check", "web3", "host-b"]).unwrap();
    assert!(!answer.text.contains("no shim"), "{}", answer.text);

    // Under its own user at the destination as well, where the first one is taken (by this very machine).
    for name in ["web1", "web2"] {
        let moved = stage.migrate(name, &["--verify"]);
        assert_eq!(
            (moved.code, &moved.last().unwrap()["digest_verified"]),
            (0, &true.into()),
            "{}",
            moved.text
        );
        stage.wait_for_end(name);
        let there = assert_has_no_rights(stage.qemu(HostId::B, name));
        assert!(!users.contains(&there));
    }
}

#[track_caller]
fn assert_reaches_nothing(stage: &Stage, user: u32, (other, pid): (&str, u32)) {
    let host = stage.rig.lab().host(HostId::A);
    for path in secrets(host, other, pid) {
        // It is there for who may.
        reach(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let tried = as_user(host, user, || reach(&path));
        let refused = tried.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
        assert!(refused, "{}: {tried:?}", path.display());
    }
    let signal = |pid: u32| test_kill_process(Pid::from_raw(pid as i32).unwrap());
    signal(pid).unwrap();
    assert_eq!(as_user(host, user, || signal(pid)), Err(rustix::io::Errno::PERM));
}

/// Connects to the attach socket of a host, and returns the answer to a greeting.
fn greet(host: &LabHost, greeting: &FromVmm) -> ToVmm {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    let address = SocketAddrUnix::new(host.directory().join("attach.sock")).unwrap();
    rustix::net::connect(&socket, &address).unwrap();
    // It may have been refused already.
    let _ = packet::send(&socket, &greeting.encode(), &[]);
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    let (length, _) = packet::recv(&socket, &mut buffer).unwrap();
    ToVmm::decode(&buffer[..length]).unwrap()
}

fn hello(name: &str) -> VmmHello {
    let (oldest, newest) = VERSIONS;
    let machine = Machine {
        vmm: "broken-out".parse().unwrap(),
        state_version: 1,
        vcpus: 1,
        features: 0,
        tsc_khz: 0,
        xcr0: 0,
        xsave_bytes: 0,
        cpuid: Vec::new(),
        msrs: Vec::new(),
    };
    let regions = vec![Region { address: 0, bytes: 64 << 20, page_bytes: 4096, offset: 0 }];
    let (name, tracker) = (name.parse().unwrap(), TrackerKind::Log);
    let shape = GuestShape { name, tracker, machine, regions, nics: Vec::new() };
    VmmHello { oldest, newest, run_state: RunState::Incoming, bond: None, shape }
}

/// The very process that the daemon has started says that it is a VMM with another guest.
#[test]
fn a_qemu_that_was_started_attaches_no_other_guest() {
    let test = "a_qemu_that_was_started_attaches_no_other_guest";
    let Some(mut stage) = stage(test, DaemonUser::Root) else { return };
    if Command::new("python3").arg("--version").output().is_err() {
        return say_skipped(test, "python3 is not installed");
    }
    let directory = stage.rig.lab().host(HostId::A).directory().to_owned();
    let (program, greeting) = (directory.join("qemu"), directory.join("hello"));
    fs::write(&greeting, FromVmm::Hello(hello("web2")).encode()).unwrap();
    let qemu = qemu::program();
    let script = format!(
        "#!/usr/bin/env python3\nimport os, socket, sys\n\
         s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n\
         s.connect(os.environ['MEMLANE_ATTACH_SOCKET'])\n\
         s.send(open('{greeting}', 'rb').read())\n\
         os.write(2, b'told: ' + s.recv(4096)[12:] + b'\\n')\n\
         os.execv('{qemu}', ['{qemu}'] + sys.argv[1:])\n",
        greeting = greeting.display(),
        qemu = qemu.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let (before, after) = (qemu.display().to_string(), program.display().to_string());
    stage.reconfigure(HostId::A, |text| text.replace(&before, &after));
    let file = directory.join("web1.toml");
    let arguments = serde_json::Value::from(words(SMALL));
    let text = format!("name = \"web1\"\nmemory = \"64MiB\"\nqemu = \"{after}\"\narguments = {arguments}\n");
    fs::write(&file, text).unwrap();
    stage.launch(HostId::A, file.to_str().unwrap());

    let log = fs::read_to_string(directory.join("guests/web1/qemu.log")).unwrap();
    assert!(log.contains("told: ") && log.contains("may attach no other"), "{log}");
    assert!(stage.rig.guest(HostId::A, "web2").unwrap().is_none());
    // As the shim's its process is welcome: the guest could be moved.
    let answer = stage.rig.ctl(HostId::A, &["check", "web1", "host-b"]).unwrap();
    assert!(!answer.text.contains("no shim"), "{}", answer.text);
}

#[test]
fn users_and_disks_that_do_not_fit_are_refused_with_words() {
    let test = "users_and_disks_that_do_not_fit_are_refused_with_words";
    let Some(stage) = stage(test, DaemonUser::Root) else { return };
    let host = stage.rig.lab().host(HostId::A);
    for user in ["1000", "2100065536"] {
        let why = [user, "guests here run as users 2100000000-2100065535", "guests.users"];
        assert_refused(&launch(&stage, "web1", "", &format!("user = {user}")), &why);
    }
    let disk = host.directory().join("web1.img");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    fs::set_permissions(&disk, Permissions::from_mode(0o600)).unwrap();
    let drive = format!("-drive file={},format=raw,if=virtio", disk.display());
    let why = ["web1.img", "Permission denied", "it ran as user 21000", "chown", "user = 21000"];
    assert_refused(&launch(&stage, "web1", &drive, ""), &why);

    let user = FIRST + 12;
    chown(&disk, Some(user), Some(user)).unwrap();
    assert_refused(&launch(&stage, "web1", &drive, ""), &why);
    let answer = launch(&stage, "web1", &drive, &format!("user = {user}"));
    assert_eq!(answer.code, 0, "{}", answer.text);
    assert_eq!(assert_has_no_rights(stage.qemu(HostId::A, "web1")), user);
    // A QEMU that is started in vain leaves nothing behind, and its user is free again.
    for _ in 0..2 {
        let answer = launch(&stage, "web2", "-machine pc-q35-99.0", &format!("user = {}", user + 1));
        assert_refused(&answer, &["unsupported machine type"]);
    }
    assert!(!host.memory_directory().join("web2.ram").exists());
}

/// As the unit for systemd has it: the daemon cannot change its user, and a starter that systemd starts for it can.
#[test]
fn a_daemon_that_is_not_root_has_guests_started() {
    let test = "a_daemon_that_is_not_root_has_guests_started";
    let Some(mut stage) = stage(test, DaemonUser::Unit) else { return };
    let nobody = ["starter.sock", "systemctl enable --now memlane-guest.socket"];
    assert_refused(&launch(&stage, "web1", "", ""), &nobody);

    common::activate(&stage, HostId::A, &format!("{FIRST}-{}", FIRST + 3));
    // The unit's options are what counts, whatever the daemon says.
    let refused = launch(&stage, "web1", "", &format!("user = {}", FIRST + 4));
    assert_refused(&refused, &["this user is not allowed by --users", &format!("{FIRST}-{}", FIRST + 3)]);

    let pids = [("web1", FIRST), ("web2", FIRST + 1)].map(|(name, user)| {
        let pid = launched(&stage, name, &format!("user = {user}"));
        assert_eq!(assert_has_no_rights(pid), user);
        pid
    });
    assert_reaches_nothing(&stage, FIRST, ("web2", pids[1]));
    let host = stage.rig.lab().host(HostId::A);
    let starter = host.directory().join("starter.sock");
    assert!(as_user(host, FIRST, || reach(&starter)).is_err());
    stage.rig.start_daemon(HostId::A).unwrap();
    for (name, pid) in ["web1", "web2"].into_iter().zip(pids) {
        stage.wait_for_standing(HostId::A, name, "running");
        assert_eq!(stage.qemu(HostId::A, name), pid);
    }
    // It is ended by the daemon, which is not its user.
    let answer = launch(&stage, "web3", "-machine pc-q35-99.0", &format!("user = {}", FIRST + 2));
    assert_refused(&answer, &["unsupported machine type"]);
    stage.kill_qemu(HostId::A, "web2");
}

/// QEMU may not open a tap, nor may a daemon that is not root open everyone's.
#[test]
fn taps_of_the_daemons_user_are_handed_on() {
    let test = "taps_of_the_daemons_user_are_handed_on";
    let open = fs::metadata("/dev/net/tun").is_ok_and(|device| device.permissions().mode() & 0o006 == 0o006);
    if !open {
        return say_skipped(test, "there is no /dev/net/tun that is open to all, as udev has it");
    }
    let Some(stage) = stage(test, DaemonUser::Unit) else { return };
    common::activate(&stage, HostId::A, &format!("{FIRST}-{LAST}"));
    let host = stage.rig.lab().host(HostId::A);
    let ip = |line: &str| {
        let mut ip = Command::new("ip");
        assert!(ip.args(["-netns", host.namespace()]).args(words(line)).status().unwrap().success());
    };
    let nic = "[[nic]]\nmac = \"52:54:00:4d:4c:04\"\ntap = \"tap-web4\"\nnetwork = \"lan\"\n";
    ip("tuntap add tap-web4 mode tap user 1");
    let remedy = "ip tuntap add tap-web4 mode tap user 64055";
    assert_refused(&launch(&stage, "web4", "", nic), &["cannot open tap tap-web4", remedy]);
    ip("link delete tap-web4");
    ip("tuntap add tap-web4 mode tap user 64055");
    assert_has_no_rights(launched(&stage, "web4", nic));
}
