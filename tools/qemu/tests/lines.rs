//! What `memlane-qemu` makes of the command lines of managers, which stand in `tests/lines/`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// What was shown for a line.
struct Shown {
    arguments: Vec<String>,
    /// What follows the arguments.
    rest: Vec<String>,
    /// What was said to a person.
    told: String,
}

impl Shown {
    /// Returns all values of an option.
    fn values(&self, option: &str) -> Vec<&str> {
        let is_value = |at: &usize| self.arguments[at - 1] == option;
        (1..self.arguments.len()).filter(is_value).map(|at| self.arguments[at].as_str()).collect()
    }

    fn has_line(&self, line: &str) -> bool {
        self.rest.iter().any(|found| found == line)
    }
}

fn fill(text: &str, directory: &Path) -> String {
    let directory = directory.to_str().unwrap();
    text.replace("{DISK}", &format!("{directory}/disk.img"))
        .replace("{DIR}", directory)
        .replace("{NAME}", "web1")
        .replace("{KVM}", "tcg")
}

fn read(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lines").join(name)).unwrap()
}

/// Returns the arguments of a manager.
fn line(name: &str, directory: &Path) -> Vec<String> {
    fs::write(directory.join("incus.conf"), fill(&read("incus.conf"), directory)).unwrap();
    let text = fill(&read(&format!("{name}.txt")), directory);
    text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
}

fn wrapper(directory: &Path) -> Command {
    let mut wrapper = Command::new(env!("CARGO_BIN_EXE_memlane-qemu"));
    fs::write(directory.join("shim.so"), "").unwrap();
    wrapper
        .env_clear()
        .env("MEMLANE_EMULATOR", "/usr/bin/qemu")
        .env("MEMLANE_SHIM", directory.join("shim.so"));
    wrapper.env("MEMLANE_MONITORS", directory.join("monitors")).env("MEMLANE_QEMU_SHOW", "1");
    wrapper
}

fn shown(Output { status, stdout, stderr }: Output, arguments: usize) -> Shown {
    let told = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{told}");
    let mut lines = String::from_utf8(stdout).unwrap().lines().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(lines.remove(0), "/usr/bin/qemu");
    let rest = lines.split_off(arguments);
    Shown { arguments: lines, rest, told }
}

/// Runs the wrapper over a manager's line, to which it adds nothing but the monitor.
fn show(name: &str, directory: &Path) -> Shown {
    let line = line(name, directory);
    let output = wrapper(directory).args(&line).output().unwrap();
    let shown = shown(output, line.len() + 4);
    assert_eq!(shown.told, "");
    let mut end = shown.arguments.len();
    for argument in
        ["chardev=memlane-monitor,mode=control", "-mon", "socket,id=memlane-monitor,fd=N,server=on,wait=off"]
    {
        end -= 1;
        assert_eq!(shown.arguments[end], argument);
    }
    let directory = directory.display();
    assert!(shown.has_line(&format!("LD_PRELOAD={directory}/shim.so")), "{:?}", shown.rest);
    assert!(shown.has_line("MEMLANE_ATTACH_SOCKET=/run/memlane/attach.sock"), "{:?}", shown.rest);
    assert!(
        shown.has_line(&format!("# fd=N is the socket {directory}/monitors/web1.sock")),
        "{:?}",
        shown.rest
    );
    shown
}

#[test]
fn a_guest_of_proxmox_gets_shared_numa_nodes() {
    let directory = tempfile::tempdir().unwrap();
    let shown = show("proxmox", directory.path());
    let shared = |id: &str| {
        format!(
            "memory-backend-file,id={id},size=128M,share=on,mem-path=/dev/shm,x-use-canonical-path-for-ramblock-id=off"
        )
    };
    assert_eq!(shown.values("-object")[..2], [shared("ram-node0"), shared("ram-node1")]);
    let mut before = line("proxmox", directory.path());
    before.retain(|argument| !argument.starts_with("memory-backend-"));
    let mut after = shown.arguments;
    after.truncate(after.len() - 4);
    after.retain(|argument| !argument.starts_with("memory-backend-"));
    assert_eq!(after, before);
}

#[test]
fn a_guest_of_incus_gets_another_file() {
    let directory = tempfile::tempdir().unwrap();
    let shown = show("incus", directory.path());
    assert_eq!(shown.values("-readconfig"), ["/proc/self/fd/N"]);
    let text = shown.rest.join("\n");
    let (_, text) = text.split_once("# /proc/self/fd/N is a file of this text:\n").unwrap();
    let expected = fill(&read("incus.conf"), directory.path())
        .replace("memory-backend-memfd\"", "memory-backend-file\"")
        .replace(
            "share = \"on\"\nsize = \"256M\"\n",
            "share = \"on\"\nsize = \"256M\"\nmem-path = \"/dev/shm\"\n",
        );
    assert_eq!(text.trim_end(), expected.trim_end());
}

#[test]
fn an_instance_of_nova_gets_a_shared_backend() {
    let directory = tempfile::tempdir().unwrap();
    let shown = show("nova", directory.path());
    let expected = "{\"id\":\"pc.ram\",\"mem-path\":\"/dev/shm\",\"qom-type\":\"memory-backend-file\",\"share\":true,\
                    \"size\":268435456,\"x-use-canonical-path-for-ramblock-id\":false}";
    assert_eq!(shown.values("-object")[0], expected);
}

#[test]
fn a_probe_is_shown_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let output = wrapper(directory.path()).args(["-machine", "none", "-S"]).output().unwrap();
    let shown = shown(output, 3);
    assert_eq!((shown.arguments.join(" ").as_str(), shown.rest.len()), ("-machine none -S", 0));
}

#[test]
fn what_is_set_already_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let mut wrapper = wrapper(directory.path());
    wrapper.env("LD_PRELOAD", "/nonexistent.so").env("MEMLANE_ATTACH_SOCKET", "/x").args(["-m", "64"]);
    wrapper.env("MEMLANE_RAM", "/dev/shm");
    let lines = String::from_utf8(wrapper.output().unwrap().stdout).unwrap();
    let preload = format!("\nLD_PRELOAD={}/shim.so /nonexistent.so\n", directory.path().display());
    assert!(lines.contains(&preload) && !lines.contains("MEMLANE_ATTACH_SOCKET"), "{lines}");
    assert!(lines.contains("size=67108864B,mem-path=/dev/shm"), "{lines}");
}

#[test]
fn a_guest_starts_without_all_that_moves_it() {
    let directory = tempfile::tempdir().unwrap();
    let emulator = directory.path().join("qemu");
    // What it is told is what it was given.
    fs::write(&emulator, "#!/bin/sh\necho \"$@\"\n").unwrap();
    fs::set_permissions(&emulator, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut wrapper = wrapper(directory.path());
    wrapper.env("MEMLANE_EMULATOR", emulator).env("MEMLANE_SHIM", "/nonexistent/shim.so");
    wrapper.env("MEMLANE_RAM", "/nonexistent").env_remove("MEMLANE_QEMU_SHOW").args(["-m", "64"]);
    let output = wrapper.output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "-m 64\n");
    let told = String::from_utf8(output.stderr).unwrap();
    for why in
        ["/nonexistent, which is no directory", "there is no shim /nonexistent/shim.so", "monitors/qemu-"]
    {
        assert!(told.contains(why), "{told}");
    }
    assert!(
        told.lines().all(|line| line.starts_with("memlane-qemu: ") && line.contains("cannot be moved: ")),
        "{told}"
    );
}
