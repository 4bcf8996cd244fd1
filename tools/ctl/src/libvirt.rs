//! Domains of libvirt: where the monitor of each is that Memlane may use, and what its XML lacks for being moved.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use memlane_api::types::ErrorCode;
use memlane_protocol::wire::Label;
use roxmltree::{Document, Node};

use crate::child;
use crate::exit::Error;
use crate::guests::MONITORS;

/// The namespace of `qemu:commandline`, libvirt's pass-through of arguments.
const QEMU: &str = "http://libvirt.org/schemas/domain/qemu/1.0";
const SHIM: &str = "libmemlane_shim.so";
const WRAPPER: &str = "memlane-qemu";
/// libvirt may take this long to describe a domain.
const PATIENCE: Duration = Duration::from_secs(30);
const DEFAULT_URI: &str = "qemu:///system";
/// The variables in which virsh looks for another libvirt than its default, which for users is not the system's.
const URI_VARIABLES: [&str; 2] = ["VIRSH_DEFAULT_CONNECT_URI", "LIBVIRT_DEFAULT_URI"];

/// A domain that can be attached.
#[derive(Debug, PartialEq)]
pub(crate) struct Domain {
    /// Its name.
    pub(crate) name: String,
    /// The socket of its monitor for Memlane.
    pub(crate) monitor: PathBuf,
}

/// Asks libvirt for a domain, and finds its monitor.
///
/// # Errors
///
/// Fails if there is no such domain, if it does not run, or if its XML lacks something.
pub(crate) fn monitor_of(domain: &str) -> Result<Domain, Error> {
    let invalid = |message: String| Error::Command(ErrorCode::Invalid, message);
    // virsh takes what begins with a dash for an option.
    if domain.is_empty() || domain.starts_with('-') || domain.contains(char::is_control) {
        return Err(invalid(format!("{domain:?} cannot be the name of a domain; see virsh list --all")));
    }
    let mut virsh = Command::new("virsh");
    virsh.arg("--quiet");
    if URI_VARIABLES.iter().all(|name| std::env::var_os(name).is_none()) {
        virsh.args(["--connect", DEFAULT_URI]);
    }
    let ended = child::run(virsh.args(["dumpxml", "--domain", domain]), PATIENCE);
    let refused = |message: String| Error::Command(ErrorCode::CannotAttach, message);
    let ended = ended.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => refused(
            "virsh is not installed; apt install libvirt-clients, or name the monitor by --qmp".into(),
        ),
        _ => refused(format!("cannot run virsh dumpxml --domain {domain}: {error}")),
    })?;
    if !ended.success {
        let lines = ended.stderr.lines().map(|line| line.trim_start_matches("error: "));
        let why = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
        return Err(refused(format!("libvirt does not describe {domain}: {why}")));
    }
    read(&ended.stdout).map_err(|why| refused(format!("cannot attach {domain}: {why}")))
}

/// Finds the monitor in a domain's XML.
fn read(xml: &str) -> Result<Domain, String> {
    let document = Document::parse(xml).map_err(|error| format!("its XML cannot be understood: {error}"))?;
    let root = document.root_element();
    if !root.has_tag_name("domain") {
        return Err("what virsh printed is no domain".to_owned());
    }
    let name = text(root, &["name"]).ok_or("its XML has no name")?.to_owned();
    if root.attribute("id").is_none() {
        return Err(format!(
            "it does not run; virsh start {name} (with --paused where it waits for a guest)"
        ));
    }
    let emulator = text(root, &["devices", "emulator"]).unwrap_or_default();
    if emulator.rsplit('/').next() == Some(WRAPPER) {
        if name.parse::<Label>().is_err() {
            return Err(format!(
                "memlane-qemu names no monitor after a domain called {name:?}: find it in {MONITORS}, and name it \
                 by --qmp"
            ));
        }
        let monitor = PathBuf::from(MONITORS).join(format!("{name}.sock"));
        return Ok(Domain { name, monitor });
    }
    let command_line = root.children().find(|node| node.has_tag_name((QEMU, "commandline")));
    let arguments = values(command_line, "arg");
    let monitor = monitor(&arguments);
    let mut lacking = lacking(root, command_line);
    if monitor.is_none() {
        lacking.push(format!(
            "a monitor for Memlane, in <qemu:commandline>:\n    \
             <qemu:arg value='-qmp'/>\n    \
             <qemu:arg value='unix:/run/memlane-libvirt/{name}.qmp,server=on,wait=off'/>"
        ));
    }
    match (monitor, lacking.is_empty()) {
        (Some(monitor), true) => Ok(Domain { name, monitor }),
        _ => Err(format!(
            "its XML lacks (virsh edit {name}, then start it anew):\n  {}\n\
             or all of that at once: <emulator>/usr/bin/{WRAPPER}</emulator>. \
             What the host needs besides: memlanectl doctor",
            lacking.join("\n  ")
        )),
    }
}

/// Lists what a domain lacks besides a monitor, with the lines to add.
fn lacking(root: Node<'_, '_>, command_line: Option<Node<'_, '_>>) -> Vec<String> {
    let mut lacking = Vec::new();
    if !has_shared_memory(root) {
        lacking.push(
            "RAM in shared files:\n    \
             <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>"
                .to_owned(),
        );
    }
    let variables = command_line.into_iter().flat_map(|line| line.children());
    let variables = variables.filter(|node| node.has_tag_name((QEMU, "env")));
    let variables: Vec<(&str, &str)> = variables
        .map(|node| (node.attribute("name").unwrap_or_default(), node.attribute("value").unwrap_or_default()))
        .collect();
    let is_set = |name: &str, part: &str| {
        variables.iter().any(|(found, value)| *found == name && value.contains(part) && !value.is_empty())
    };
    if !is_set("LD_PRELOAD", SHIM) {
        lacking.push(format!(
            "the shim, in <qemu:commandline>:\n    \
             <qemu:env name='LD_PRELOAD' value='/usr/lib/memlane/{SHIM}'/>"
        ));
    }
    if !is_set("MEMLANE_ATTACH_SOCKET", "") {
        lacking.push(
            "where the shim finds the daemon, in <qemu:commandline>:\n    \
             <qemu:env name='MEMLANE_ATTACH_SOCKET' value='/run/memlane/attach.sock'/>"
                .to_owned(),
        );
    }
    if command_line.is_none() {
        lacking.push(format!(
            "the namespace of <qemu:commandline>, without which libvirt drops it:\n    \
             <domain type='kvm' xmlns:qemu='{QEMU}'>"
        ));
    }
    lacking
}

/// Whether all RAM is in files that are shared: of the whole domain, or of each of its NUMA nodes.
fn has_shared_memory(root: Node<'_, '_>) -> bool {
    let backing = child(root, "memoryBacking");
    let is_shared = backing.and_then(|backing| child(backing, "access")?.attribute("mode")) == Some("shared");
    let source = backing.and_then(|backing| child(backing, "source")?.attribute("type"));
    let has_huge_pages = backing.is_some_and(|backing| child(backing, "hugepages").is_some());
    let numa = child(root, "cpu").and_then(|cpu| child(cpu, "numa"));
    let cells: Vec<Node<'_, '_>> =
        numa.into_iter().flat_map(|numa| numa.children()).filter(|node| node.has_tag_name("cell")).collect();
    let cells_say = |mode| cells.iter().any(|cell| cell.attribute("memAccess") == Some(mode));
    let all_cells =
        !cells.is_empty() && cells.iter().all(|cell| cell.attribute("memAccess") == Some("shared"));
    (source == Some("file") || has_huge_pages) && (is_shared && !cells_say("private") || all_cells)
}

/// Finds the socket of a monitor that libvirt does not use itself, among the arguments that were passed through.
fn monitor(arguments: &[&str]) -> Option<PathBuf> {
    let following = |option: &'static str| {
        let is_it = move |word: &str| word.trim_start_matches('-') == option && word.starts_with('-');
        arguments.windows(2).filter(move |pair| is_it(pair[0])).map(|pair| pair[1])
    };
    let direct = following("qmp").find_map(|value| {
        let mut parts = value.strip_prefix("unix:")?.split(',');
        let path = parts.next()?;
        listens(parts).then_some(path)
    });
    let by_device = || {
        following("mon").find_map(|value| {
            let id = option(value, "chardev")
                .or_else(|| value.split(',').next().filter(|word| !word.contains('=')))?;
            (option(value, "mode") == Some("control")).then_some(())?;
            following("chardev").find_map(|device| {
                (device.starts_with("socket,") && option(device, "id") == Some(id)).then_some(())?;
                listens(device.split(',')).then(|| option(device, "path"))?
            })
        })
    };
    direct.or_else(by_device).filter(|path| path.starts_with('/')).map(PathBuf::from)
}

/// Whether options of a socket have QEMU listen there.
fn listens<'a>(mut options: impl Iterator<Item = &'a str>) -> bool {
    options.any(|option| matches!(option, "server" | "server=on" | "server=yes" | "server=true"))
}

/// Finds the value of a key among options that are joined by commas.
fn option<'a>(options: &'a str, key: &str) -> Option<&'a str> {
    options.split(',').find_map(|option| option.strip_prefix(key)?.strip_prefix('='))
}

fn values<'a>(command_line: Option<Node<'a, '_>>, tag: &str) -> Vec<&'a str> {
    let all = command_line.into_iter().flat_map(|line| line.children());
    all.filter(|node| node.has_tag_name((QEMU, tag))).filter_map(|node| node.attribute("value")).collect()
}

fn child<'a, 'input>(node: Node<'a, 'input>, tag: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(tag))
}

fn text<'a>(root: Node<'a, '_>, path: &[&str]) -> Option<&'a str> {
    let node = path.iter().try_fold(root, |node, tag| child(node, tag))?;
    node.text().map(str::trim).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests;
