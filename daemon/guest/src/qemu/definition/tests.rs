use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use memlane_lab::qmp::Monitor;
use memlane_lab::{Requirement, qemu, say_skipped, skip};
use proptest::prelude::*;
use serde_json::json;

use super::super::handed;
use super::super::state_directory::Paths;
use super::*;

const FILE: &str = "web1.toml";
const MINIMAL: &str = "name = \"web1\"\nmemory = \"2GiB\"\n";

fn parse(text: &str) -> Result<Definition, DefinitionError> {
    Definition::parse(Path::new(FILE), text)
}

fn complaint(text: &str) -> String {
    match parse(text) {
        Err(error) => error.to_string(),
        Ok(definition) => panic!("{text}: accepted as {definition:?}"),
    }
}

fn given() -> Given {
    Given::by_descriptor(4, 5, [6, 7])
}

#[test]
fn two_keys_are_enough() {
    let definition = parse(MINIMAL).unwrap();
    assert_eq!(
        definition,
        Definition {
            name: "web1".parse().unwrap(),
            memory: 2 << 30,
            prealloc: false,
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            user: None,
            arguments: Vec::new(),
            nics: Vec::new(),
            machine: None,
            text: MINIMAL.to_owned(),
        }
    );
    assert!(definition.permitted_by(&GuestsConfig::default()).is_ok());
}

#[test]
fn all_keys_are_read() {
    let text = r#"
        name = "web1"
        memory = "64MiB"
        prealloc = true
        qemu = "/opt/qemu"
        user = 2100000012
        arguments = ["-machine", "q35", "-append", "", "-qmp", "unix:/run/mine,server=on,wait=off"]
        [[nic]]
        mac = "52:54:00:4D:4c:01"
        tap = "tap-web1"
        network = "lan"
        [[nic]]
        mac = "52:54:00:4d:4c:02"
        tap = "tap-web1b"
        network = "lan"
        vhost = true
    "#;
    let definition = parse(text).unwrap();
    assert_eq!((definition.memory, definition.prealloc), (64 << 20, true));
    assert_eq!(definition.user, Some(2_100_000_012));
    assert_eq!(definition.arguments.len(), 6);
    let nic = |last, tap: &str, vhost| DefinedNic {
        mac: [0x52, 0x54, 0, 0x4d, 0x4c, last],
        tap: tap.to_owned(),
        network: "lan".parse().unwrap(),
        vhost,
    };
    assert_eq!(definition.nics, [nic(1, "tap-web1", false), nic(2, "tap-web1b", true)]);
    assert_eq!(definition.text, text);

    let error = definition.permitted_by(&GuestsConfig::default()).unwrap_err().to_string();
    assert!(error.contains("the guest file names /opt/qemu, which may not be started here"), "{error}");
    assert!(error.contains("guests.qemu") && error.contains("allows /usr/bin/qemu-system-x86_64"), "{error}");
    let nothing = GuestsConfig { qemu: Vec::new(), ..GuestsConfig::default() };
    assert!(definition.permitted_by(&nothing).unwrap_err().to_string().contains("allows none"));
}

/// These are mistakes of each kind behind the two keys that are needed, each with its line and parts of the complaint.
#[test]
fn every_complaint_names_line_key_and_remedy() {
    let nic = "[[nic]]\nmac = \"52:54:00:4d:4c:01\"\ntap = \"tap0\"\nnetwork = \"lan\"\n";
    let mistakes = [
        (
            "vcpus = 2".to_owned(),
            3,
            ["unknown key vcpus", "name, memory, prealloc, qemu, user, arguments, nic"],
        ),
        ("prealloc = 1".to_owned(), 3, ["prealloc = 1 ", "true or false"]),
        ("qemu = \"qemu\"".to_owned(), 3, ["qemu = \"qemu\"", "begins with /"]),
        ("user = 0".to_owned(), 3, ["user = 0 ", "from 1000 to 2147483647"]),
        ("user = \"web1\"".to_owned(), 3, ["user = \"web1\"", "a whole number"]),
        ("arguments = \"-smp 2\"".to_owned(), 3, ["arguments = \"-smp 2\"", "a list of QEMU's arguments"]),
        ("arguments = [\n\"-smp\",\n2]".to_owned(), 5, ["arguments = 2 ", "a list of QEMU's arguments"]),
        ("arguments = [\"a\\u0000b\"]".to_owned(), 3, ["arguments = ", "without NUL"]),
        (nic.replace("mac", "mca"), 3, ["nic.mac is missing", "unicast"]),
        (nic.replace("52:", "53:"), 4, ["nic.mac = \"53:", "unicast"]),
        (nic.replace("52:54:00:4d:4c:01", "0:0:0:0:0:0"), 4, ["nic.mac = ", "unicast"]),
        (nic.replace("52:54:00:4d:4c:01", "00:00:00:00:00:00"), 4, ["nic.mac = ", "unicast"]),
        (nic.replace("52:", "+2:"), 4, ["nic.mac = ", "unicast"]),
        (nic.replace(":01", ""), 4, ["nic.mac = ", "unicast"]),
        (nic.replace(":01", ":01:02"), 4, ["nic.mac = ", "unicast"]),
        (nic.replace("tap0", "tap/0"), 5, ["nic.tap = ", "network interface"]),
        (nic.replace("lan", "-lan"), 6, ["nic.network = ", "A-Z a-z 0-9"]),
        (format!("{nic}model = \"e1000\""), 7, ["unknown key nic.model", "mac, tap, network, vhost"]),
        (format!("{nic}{nic}"), 8, ["nic.mac = ", "stands on line 4 already"]),
        (format!("{nic}{}", nic.replace(":01", ":02")), 9, ["nic.tap = ", "stands on line 5 already"]),
    ];
    for (text, line, parts) in mistakes {
        let message = complaint(&format!("{MINIMAL}{text}"));
        assert!(message.starts_with(&format!("{FILE}:{line}: ")), "{text}\n{message}");
        assert!(parts.iter().all(|part| message.contains(part)), "{text}\n{message}");
    }
    for memory in ["0B", "1023KiB", "1028KiB", "65TiB", "2147483649B", "2", "2GB"] {
        let message = complaint(&format!("name = \"web1\"\nmemory = \"{memory}\""));
        let allowed = "from 1MiB to 64TiB in multiples of 8KiB";
        assert!(message.starts_with("web1.toml:2: memory = ") && message.contains(allowed), "{message}");
    }
    assert!(complaint("memory = \"2GiB\"").contains("name is missing"));
    assert!(complaint("name = \"web1\"").contains("memory is missing"));
}

#[test]
fn hardware_addresses_are_those_of_one_nic() {
    assert_eq!(unicast_mac("52:54:00:12:34:56"), Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
    for wrong in ["", "52:54:00:12:34", "52:54:00:12:34:5g", "52:54:0:12:34:56", "+2:54:00:12:34:56"] {
        assert_eq!(unicast_mac(wrong), None, "{wrong}");
    }
}

#[test]
fn arguments_that_the_daemon_gives_are_refused_with_the_reason() {
    let clashes = [
        ("\"-m\", \"2G\"", "\"-m\"", "memory = "),
        ("\"--m\", \"2G\"", "\"--m\"", "memory = "),
        ("\"-name\", \"web2\"", "\"-name\"", "name = "),
        ("\"-mem-path\", \"/dev/shm\"", "\"-mem-path\"", "guests.memory"),
        ("\"-incoming\", \"defer\"", "\"-incoming\"", "memlanectl launch --incoming"),
        ("\"-daemonize\"", "\"-daemonize\"", "background"),
        ("\"-runas\", \"nobody\"", "\"-runas\"", "user = "),
        ("\"-S\"", "\"-S\"", "runs at once"),
        ("\"-preconfig\"", "\"-preconfig\"", "runs at once"),
        ("\"-machine\", \"q35,memory-backend=mine\"", "\"q35,memory-backend=mine\"", "its RAM"),
        ("\"--M\", \"memory-backend=mine\"", "\"memory-backend=mine\"", "its RAM"),
    ];
    for (arguments, found, remedy) in clashes {
        let message = complaint(&format!("{MINIMAL}arguments = [\"-nodefaults\",\n{arguments}]"));
        let expected =
            format!("{FILE}:4: arguments = {found} is not allowed; give it arguments without it: ");
        assert!(message.starts_with(&expected) && message.contains(remedy), "{message}");
    }
    // What only looks alike is QEMU's affair.
    let alike = r#"["-smp", "2", "-append", "memory-backend=x", "-msg", "timestamp=on", "-s"]"#;
    assert!(parse(&format!("{MINIMAL}arguments = {alike}")).is_ok());
}

#[test]
fn nothing_grows_beyond_its_bound() {
    let many = |count| format!("{MINIMAL}arguments = [{}]", "\"x\",".repeat(count));
    assert_eq!(parse(&many(MAX_ARGUMENTS)).unwrap().arguments.len(), MAX_ARGUMENTS);
    assert!(complaint(&many(MAX_ARGUMENTS + 1)).contains("256 arguments at most"));
    let long = |length| format!("{MINIMAL}arguments = [\"{}\"]", "x".repeat(length));
    assert!(parse(&long(MAX_ARGUMENT)).is_ok());
    assert!(complaint(&long(MAX_ARGUMENT + 1)).contains("4096 bytes at most"));
    let nic = |n| format!("[[nic]]\nmac = \"52:54:00:00:00:{n:02x}\"\ntap = \"t{n}\"\nnetwork = \"lan\"\n");
    let nics = |count| MINIMAL.to_owned() + &(0..count).map(nic).collect::<String>();
    assert_eq!(parse(&nics(MAX_NICS)).unwrap().nics.len(), MAX_NICS);
    assert!(complaint(&nics(MAX_NICS + 1)).contains("16 [[nic]] at most, and this one has 17"));
    let padded = |length: usize| MINIMAL.to_owned() + &" ".repeat(length - MINIMAL.len());
    assert!(parse(&padded(MAX_DEFINITION_BYTES)).is_ok());
    assert!(
        complaint(&padded(MAX_DEFINITION_BYTES + 1)).contains("65536 bytes at most, and this one has 65537")
    );
}

#[test]
fn the_command_line_is_complete() {
    let text = format!(
        "{MINIMAL}arguments = [\"-machine\", \"q35\"]\n[[nic]]\nmac = \"52:54:00:4d:4c:01\"\ntap = \"t,0\"\n\
         network = \"lan\"\nvhost = true"
    );
    let mut definition = parse(&text).unwrap();
    let line = definition.command_line(&given(), false);
    assert_eq!(
        line,
        [
            "-name",
            "guest=web1,debug-threads=on",
            "-m",
            "2147483648B",
            "-object",
            "memory-backend-file,id=memlane-ram,share=on,size=2147483648,mem-path=/proc/self/fd/4",
            "-machine",
            "memory-backend=memlane-ram",
            "-chardev",
            "socket,id=memlane-monitor,fd=5,server=on,wait=off",
            "-mon",
            "chardev=memlane-monitor,mode=control",
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-display",
            "none",
            "-machine",
            "q35",
            "-netdev",
            "tap,id=memlane-net0,fd=6,vhost=on",
            "-device",
            "virtio-net-pci,netdev=memlane-net0,mac=52:54:00:4d:4c:01",
        ]
    );
    definition.prealloc = true;
    let line = definition.command_line(&given(), true).join(" ");
    assert!(line.contains("mem-path=/proc/self/fd/4,prealloc=on -machine"), "{line}");
    assert!(line.contains("-display none -incoming defer -machine q35"), "{line}");
    for display in ["-display", "--display", "-nographic", "-vnc", "-spice"] {
        definition.arguments = vec![display.to_owned()];
        let line = definition.command_line(&given(), false).join(" ");
        assert!(!line.contains("-display none"), "{line}");
    }
    definition.arguments = vec!["-sandbox".to_owned(), "on".to_owned()];
    let line = definition.command_line(&given(), false);
    assert_eq!(line.iter().filter(|argument| *argument == "-sandbox").count(), 1, "{line:?}");
}

#[test]
fn a_guest_keeps_the_machine_that_it_has() {
    let line = |machine: &str| {
        let text = format!("{MINIMAL}arguments = [\"-machine\", \"q35,smm=off\"]\n");
        parse(&text).unwrap().with_machine(machine).command_line(&given(), true).join(" ")
    };
    // Behind the guest file's own word.
    assert!(
        line("pc-q35-7.2").contains("-machine q35,smm=off -machine pc-q35-7.2"),
        "{}",
        line("pc-q35-7.2")
    );
    for odd in ["", "pc,firmware=/etc/shadow", "-incoming", "pc q35"] {
        assert_eq!(line(odd).matches("-machine").count(), 2, "{odd:?}");
    }
}

#[test]
fn the_real_qemu_takes_it() {
    const TEST: &str = "the_real_qemu_takes_it";
    if skip(TEST, &[Requirement::Qemu]) {
        return;
    }
    let text = "name = \"web1\"\nmemory = \"65544KiB\"\n\
                arguments = [\"-M\", \"q35,smm=off\", \"-accel\", \"tcg\", \"-nodefaults\"]\n";
    let mut definition = parse(text).unwrap();
    definition.qemu = qemu::program();
    let about = |definition: &Definition, incoming, taps| Qemu::start(definition, incoming, taps).about();
    assert_eq!(about(&definition, false, vec![]), ("running".to_owned(), definition.memory));
    definition.prealloc = true;
    assert_eq!(about(&definition, true, vec![]), ("inmigrate".to_owned(), definition.memory));

    if !rustix::process::geteuid().is_root() || !Path::new("/dev/net/tun").exists() {
        return say_skipped(TEST, "NICs need root and /dev/net/tun");
    }
    // The tap is made in a network namespace of its own, and ends with QEMU.
    for vhost in [false, true] {
        if vhost && !Path::new("/dev/vhost-net").exists() {
            return say_skipped(TEST, "vhost=on needs /dev/vhost-net (modprobe vhost_net)");
        }
        let mac = [0x52, 0x54, 0, 0x4d, 0x4c, 1];
        definition.nics =
            vec![DefinedNic { mac, tap: "tap,0".to_owned(), network: "lan".parse().unwrap(), vhost }];
        let opened = std::thread::spawn(|| {
            // SAFETY: a network namespace of its own leaves the thread's memory and descriptors alone.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
            handed::tap_of("tap,0")
        });
        let taps = vec![opened.join().unwrap().unwrap()];
        assert_eq!(about(&definition, false, taps), ("running".to_owned(), definition.memory));
    }
}

/// A QEMU of a test.
struct Qemu {
    process: Child,
    paths: Paths,
    _directory: tempfile::TempDir,
}

impl Qemu {
    fn start(definition: &Definition, incoming: bool, taps: Vec<OwnedFd>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let paths = Paths { memory: path("ram"), qmp: path("qmp.sock") };
        let memory = std::fs::File::create_new(&paths.memory).unwrap();
        let monitor = handed::monitor(&paths.qmp).unwrap();
        let inherited = |descriptor: &OwnedFd| {
            rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty()).unwrap();
            descriptor.as_raw_fd()
        };
        let memory = OwnedFd::from(memory);
        let taps = taps.iter().map(inherited);
        let given = Given::by_descriptor(inherited(&memory), inherited(&monitor), taps);
        let line = definition.command_line(&given, incoming);
        let process = Command::new(&definition.qemu).args(line).stdin(Stdio::null()).spawn().unwrap();
        Self { process, paths, _directory: directory }
    }

    /// Returns its run state, and the bytes of the shared backend that is its RAM.
    fn about(mut self) -> (String, u64) {
        let mut monitor =
            Monitor::connect_while(&self.paths.qmp, || matches!(self.process.try_wait(), Ok(None))).unwrap();
        let mut ask = |command: &str| monitor.execute(command, json!({})).unwrap();
        assert_eq!(ask("query-name")["name"], "web1");
        let status = ask("query-status")["status"].as_str().unwrap().to_owned();
        let backends = ask("query-memdev");
        assert_eq!((&backends[0]["id"], &backends[0]["share"]), (&BACKEND.into(), &true.into()));
        let base = ask("query-memory-size-summary")["base-memory"].as_u64().unwrap();
        assert_eq!(self.paths.memory.metadata().unwrap().len(), base);
        ask("quit");
        assert!(self.process.wait().unwrap().success());
        (status, base)
    }
}

impl Drop for Qemu {
    /// Ends it after a failed assertion; otherwise it has ended.
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// These lines may stand in a guest file, good and bad.
fn line() -> impl Strategy<Value = String> {
    let argument = "(-(m|S|M|machine|nographic)|q35|memory-backend=x|[ -~]{0,6}|\\PC{0,3})";
    let list = proptest::collection::vec(argument, 0..4);
    prop_oneof![
        "name = \"[a-z.-]{1,5}\"",
        "memory = \"[0-9]{1,6}[KMGT]iB\"",
        "(prealloc|vhost) = (true|false|1)",
        "qemu = \"[/a-z]{0,9}\"",
        list.prop_map(|list| format!("arguments = {list:?}")),
        Just("[[nic]]".to_owned()),
        "mac = \"5[0-4](:[0-9a-f]{2}){4,6}\"",
        "tap = \"[a-z,/]{0,17}\"",
        Just("network = \"lan\"".to_owned()),
        "\\PC{0,20}",
    ]
}

proptest! {
    #[test]
    fn what_is_read_lies_within_its_bounds(
        minimal in any::<bool>(),
        lines in proptest::collection::vec(line(), 0..8),
    ) {
        let text = if minimal { MINIMAL } else { "" }.to_owned() + &lines.join("\n");
        let Ok(definition) = parse(&text) else { return Ok(()) };
        prop_assert!(definition.memory.is_multiple_of(MEMORY_UNIT));
        prop_assert!((MIN_MEMORY..=MAX_RAM_BYTES).contains(&definition.memory));
        prop_assert!(definition.qemu.is_absolute());
        prop_assert!(definition.arguments.len() <= MAX_ARGUMENTS && definition.nics.len() <= MAX_NICS);
        for argument in &definition.arguments {
            prop_assert!(argument.len() <= MAX_ARGUMENT && !argument.contains('\0'));
            prop_assert!(!matches!(option(argument), Some("m" | "S")));
        }
        for nic in &definition.nics {
            prop_assert!(nic.mac[0] & 1 == 0 && nic.tap.len() < 16 && !nic.tap.contains('/'));
        }
        let line = definition.command_line(&given(), false);
        prop_assert!(line.iter().filter(|argument| *argument == "-m").count() == 1);
        prop_assert_eq!(parse(&definition.text).unwrap(), definition);
    }
}
