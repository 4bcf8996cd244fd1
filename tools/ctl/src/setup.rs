//! `memlanectl setup`: makes a first configuration from what was found on this host.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use memlane_api::client::Client;
use memlane_api::types::ErrorCode;
use memlane_guest::config::number_of;
use memlane_protocol::wire::Label;
use memlaned::config::Config;
use serde::Serialize;

use crate::args::{Pair, SetupArgs};
use crate::doctor::libvirt::QEMU_USER;
use crate::doctor::{self, Finding};
use crate::exit::{Error, Exit};
use crate::interfaces::{self, Interface};
use crate::{child, show};

/// `memlaned --check-config` may take this long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Interfaces whose names begin so belong to container engines, tunnels and guests.
const OF_OTHERS: [&str; 19] = [
    "docker",
    "br-",
    "veth",
    "ve-",
    "vb-",
    "virbr",
    "vnet",
    "tap",
    "tun",
    "lxc",
    "lxdbr",
    "incusbr",
    "cni",
    "flannel",
    "cali",
    "podman",
    "wg",
    "tailscale",
    "zt",
];
/// Kinds of interfaces that lead to no other host of the network, or only through something else.
const OTHER_KINDS: [&str; 10] =
    ["tun", "dummy", "ifb", "wireguard", "vxlan", "gre", "sit", "ipip", "vrf", "nlmon"];

/// What was made, for programs.
#[derive(Serialize)]
struct Made<'a> {
    /// The text of the configuration.
    configuration: &'a str,
    /// The file that it is in; `null` without `--write`.
    written: Option<&'a Path>,
    /// What `memlanectl doctor` says of this host with that configuration.
    findings: &'a [Finding],
}

/// Makes a configuration, and shows it or puts it in its place.
///
/// # Errors
///
/// Fails if the command line does not fit this host, or if the file cannot be written.
pub(crate) async fn run(client: &Client, options: &SetupArgs, as_json: bool) -> Result<Exit, Error> {
    if options.write && options.config.symlink_metadata().is_ok() {
        return Err(there_already(&options.config));
    }
    let interfaces = interfaces::read()
        .map_err(|error| Error::Command(ErrorCode::Unavailable, format!("{error}; apt install iproute2")))?;
    let accounts = Found {
        attach_users: present(&["root", QEMU_USER], "/etc/passwd"),
        viewers: present(&["memlane-viewers"], "/etc/group"),
    };
    let text = plan(options, &interfaces, accounts)?.to_string();
    let config = Config::parse(&options.config, &text)
        .map_err(|error| Error::Command(ErrorCode::Invalid, format!("{error}; in:\n{text}")))?;
    let said = match options.write {
        true => {
            write(&options.config, &text)?;
            checked(&options.config, &config)?
        }
        false => None,
    };
    let findings = doctor::examine(client, &config, &options.config).await;
    if as_json {
        let written = options.write.then_some(options.config.as_path());
        show::json(&Made { configuration: &text, written, findings: &findings });
        return Ok(Exit::Completed);
    }
    show::note(&doctor::text(&findings, doctor::Shown::Unfinished));
    match options.write {
        true => show::line(&next_steps(&options.config, &config, said.as_deref())),
        false => show::line(text.trim_end()),
    }
    Ok(Exit::Completed)
}

/// Finds the interfaces that may be lent to migrations, each with the address for it, by address: so the same networks
/// get the same names on all hosts.
pub(crate) fn port_candidates(interfaces: &[Interface]) -> Vec<(&Interface, Ipv4Addr)> {
    let is_one = |interface: &&Interface| {
        let is_others = OF_OTHERS.iter().any(|prefix| interface.name.starts_with(prefix))
            || interface.kind.as_deref().is_some_and(|kind| OTHER_KINDS.contains(&kind));
        let leads_out = !interface.is_bridge() || has_card(&interface.name, interfaces);
        interface.carries && interface.name != "lo" && !is_others && leads_out
    };
    let addressed = |interface| Some((interface, ipv4(interface)?));
    let mut all: Vec<_> = interfaces.iter().filter(is_one).filter_map(addressed).collect();
    if all.iter().any(|(interface, _)| !interface.is_default_route) {
        all.retain(|(interface, _)| !interface.is_default_route);
    }
    all.sort_by_key(|(_, address)| *address);
    all
}

/// Whether a member of the bridge is more than the end of a guest or a container.
fn has_card(bridge: &str, interfaces: &[Interface]) -> bool {
    let members = interfaces.iter().filter(|interface| interface.master.as_deref() == Some(bridge));
    members.into_iter().any(|member| !matches!(member.kind.as_deref(), Some("tun" | "veth")))
}

fn ipv4(interface: &Interface) -> Option<Ipv4Addr> {
    interface.addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    })
}

/// The users and groups of this host that a configuration names.
struct Found {
    attach_users: Vec<&'static str>,
    viewers: Vec<&'static str>,
}

fn present(names: &[&'static str], file: &str) -> Vec<&'static str> {
    names.iter().copied().filter(|name| number_of(name, file).is_some()).collect()
}

/// What goes into the configuration.
struct Plan {
    host: Label,
    accounts: Found,
    ports: Vec<(Label, String, IpAddr)>,
    peers: Vec<(Label, String)>,
    networks: Vec<(Label, String)>,
}

fn plan(options: &SetupArgs, interfaces: &[Interface], accounts: Found) -> Result<Plan, Error> {
    let invalid = |message: String| Error::Command(ErrorCode::Invalid, message);
    let host = match &options.host {
        Some(host) => host.clone(),
        None => {
            let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
            name.parse().map_err(|_| {
                invalid(format!(
                    "the machine's own name, {name:?}, cannot be that of a host; name one: --host host-a"
                ))
            })?
        }
    };
    let named = |Pair { name, value }: &Pair| {
        let interface = interfaces.iter().find(|interface| interface.name == *value);
        let interface = interface.ok_or_else(|| {
            invalid(format!("--port {name}={value}: there is no such interface; see ip link"))
        })?;
        let address = interface.addresses.first();
        let address = address.ok_or_else(|| {
            invalid(format!(
                "--port {name}={value}: it has no address that others reach; ip address add ... dev {value}"
            ))
        })?;
        Ok((name.clone(), value.clone(), *address))
    };
    let ports = match options.ports.is_empty() {
        false => options.ports.iter().map(named).collect::<Result<Vec<_>, Error>>()?,
        true => {
            let found = port_candidates(interfaces).into_iter().zip(port_names());
            found.map(|((interface, address), name)| (name, interface.name.clone(), address.into())).collect()
        }
    };
    let peer = |Pair { name, value }: &Pair| {
        let is_numeric = value.parse::<IpAddr>().is_ok() || value.parse::<SocketAddr>().is_ok();
        match is_numeric {
            true => Ok((name.clone(), value.clone())),
            false => Err(invalid(format!(
                "--peer {name}={value}: give its numeric address, with or without a port, such as 192.0.2.12"
            ))),
        }
    };
    let peers = options.peers.iter().map(peer).collect::<Result<Vec<_>, Error>>()?;
    let mut given = BTreeSet::new();
    let names = options.ports.iter().map(|pair| ("port", &pair.name));
    for (option, name) in names.chain(options.peers.iter().map(|pair| ("peer", &pair.name))) {
        if !given.insert((option, name.as_str())) {
            return Err(invalid(format!(
                "--{option} {name}=... is given two times; each needs a name of its own"
            )));
        }
    }
    let bridges = interfaces.iter().filter(|interface| {
        interface.is_bridge() && !OF_OTHERS.iter().any(|prefix| interface.name.starts_with(prefix))
    });
    let networks =
        bridges.filter_map(|bridge| Some((bridge.name.parse().ok()?, bridge.name.clone()))).collect();
    Ok(Plan { host, accounts, ports, peers, networks })
}

/// The names of ports that nobody named: a, b, and so on.
fn port_names() -> impl Iterator<Item = Label> {
    let letters = ('a'..='z').map(String::from);
    let numbered = (27..).map(|number| format!("p{number}"));
    letters.chain(numbered).filter_map(|name| name.parse().ok())
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| quoted(name)).collect();
            format!("[{}]", names.join(", "))
        };
        writeln!(
            f,
            "# The configuration of memlaned, made by memlanectl setup. All keys and their defaults are explained in"
        )?;
        writeln!(
            f,
            "# /usr/share/doc/memlane/examples/memlaned.toml. A changed file counts when the daemon starts."
        )?;
        writeln!(f, "\n# The name of this host, as its certificate and the [[peer]] of others have it.")?;
        writeln!(f, "host = {}", quoted(self.host.as_str()))?;
        if self.accounts.attach_users.contains(&QEMU_USER) {
            writeln!(f, "# Whose VMMs may attach guests: {QEMU_USER} is who libvirt runs QEMU as.")?;
            writeln!(f, "attach_users = {}", list(&self.accounts.attach_users))?;
        }
        writeln!(
            f,
            "\n# The ports lent to migrations. Lanes join ports of one name: name them alike on all hosts."
        )?;
        if self.ports.is_empty() {
            writeln!(f, "# No interface was found for one: nothing can move without.\n#[[port]]")?;
            writeln!(f, "#name = \"a\"\n#address = \"192.0.2.11\"\n#interface = \"eth1\"\n")?;
        }
        for (name, interface, address) in &self.ports {
            let (name, interface) = (quoted(name.as_str()), quoted(interface));
            writeln!(f, "[[port]]\nname = {name}\naddress = \"{address}\"\ninterface = {interface}\n")?;
        }
        writeln!(
            f,
            "# The hosts that guests may move to and come from, by their names and where their daemons listen."
        )?;
        if self.peers.is_empty() {
            writeln!(f, "#[[peer]]\n#name = \"host-b\"\n#control = \"192.0.2.12:7410\"\n")?;
        }
        for (name, control) in &self.peers {
            writeln!(f, "[[peer]]\nname = {}\ncontrol = {}\n", quoted(name.as_str()), quoted(control))?;
        }
        writeln!(
            f,
            "# The networks that guests are plugged into. A guest moves to hosts that have a bridge for each of"
        )?;
        writeln!(f, "# its own, under the same name.")?;
        if self.networks.is_empty() {
            writeln!(f, "#[[network]]\n#name = \"lan\"\n#bridge = \"br0\"")?;
        }
        for (index, (name, bridge)) in self.networks.iter().enumerate() {
            let gap = if index > 0 { "\n" } else { "" };
            writeln!(f, "{gap}[[network]]\nname = {}\nbridge = {}", quoted(name.as_str()), quoted(bridge))?;
        }
        if !self.accounts.viewers.is_empty() {
            let viewers: Vec<String> = self.accounts.viewers.iter().map(|name| format!("@{name}")).collect();
            let viewers: Vec<&str> = viewers.iter().map(String::as_str).collect();
            writeln!(f, "\n# Members of the group memlane may give orders. These may look:")?;
            writeln!(f, "[api]\nviewers = {}", list(&viewers))?;
        }
        Ok(())
    }
}

/// Quotes text for TOML, whose strings are escaped as those of JSON.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Puts a file in its place, where there is none, such that it is there whole or not at all.
fn write(file: &Path, text: &str) -> Result<(), Error> {
    const MODE: u32 = 0o644;
    let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.map_or_else(|| PathBuf::from("."), Path::to_owned);
    let put = || -> io::Result<()> {
        fs::create_dir_all(&directory)?;
        let mut new = tempfile::Builder::new().prefix(".memlaned").suffix(".toml").tempfile_in(&directory)?;
        new.write_all(text.as_bytes())?;
        // Whatever the umask is.
        new.as_file().set_permissions(Permissions::from_mode(MODE))?;
        new.as_file().sync_all()?;
        new.persist_noclobber(file)?;
        File::open(&directory)?.sync_all()
    };
    put().map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists if file.symlink_metadata().is_ok() => there_already(file),
        io::ErrorKind::PermissionDenied => Error::Write(format!(
            "cannot write {}: {error}; be root, or name another file by --config",
            file.display()
        )),
        _ => Error::Write(format!("cannot write {}: {error}", file.display())),
    })
}

fn there_already(file: &Path) -> Error {
    let file = file.display();
    Error::Command(
        ErrorCode::Refused,
        format!(
            "{file} is there already, and is left as it is; move it away, or name another file by --config"
        ),
    )
}

/// Has `memlaned` check the file, if it is installed, and returns what it says.
fn checked(file: &Path, config: &Config) -> Result<Option<String>, Error> {
    let mut memlaned = Command::new("memlaned");
    let ended = match child::run(memlaned.arg("--check-config").arg("--config").arg(file), PATIENCE) {
        Ok(ended) => ended,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::Write(format!("cannot run memlaned --check-config: {error}"))),
    };
    let said = format!("{}{}", ended.stdout, ended.stderr).trim().to_owned();
    let has_keys = config.keys.as_ref().is_none_or(|keys| keys.certificate.exists());
    match ended.success || !has_keys {
        true => Ok(Some(said)),
        false => Err(Error::Write(format!(
            "{} was written, and memlaned does not take it: {said}",
            file.display()
        ))),
    }
}

fn next_steps(file: &Path, config: &Config, said: Option<&str>) -> String {
    let (host, name) = (&config.host, file.display());
    let mut text = format!("wrote {name}");
    let _ = match said {
        Some(said) => write!(text, "\nmemlaned --check-config: {said}"),
        None => {
            write!(text, "\nmemlaned is not installed here: check the file there by memlaned --check-config")
        }
    };
    let mut steps = vec![format!("look at it: {name}")];
    if config.peers.is_empty() {
        steps.push(format!("add a [[peer]] for each other host to {name}"));
    }
    if config.keys.is_some() {
        steps.push("once, on a machine of administrators: memlanectl keys init".to_owned());
        steps.push(format!(
            "there: memlanectl keys issue {host}; then put the three files into /etc/memlane/keys here"
        ));
    }
    steps.push("systemctl enable --now memlane-guest.socket memlaned".to_owned());
    steps.push("memlanectl doctor".to_owned());
    text.push_str("\nnext:");
    for (index, step) in steps.iter().enumerate() {
        let _ = write!(text, "\n  {}. {step}", index + 1);
    }
    text
}

#[cfg(test)]
mod tests;
