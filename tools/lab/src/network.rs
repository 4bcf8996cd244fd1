//! Links, addresses and rate limits, set with `ip` and `tc`.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

use crate::rate::Rate;

/// The bridge that guests' interfaces are joined to.
#[derive(Debug, Clone)]
pub struct Bridge {
    /// The name of the bridge's own interface, `br0`.
    pub interface: String,
    /// The name of an interface outside the bridge, at the other end of one of its ports. What leaves the bridge can be
    /// captured here.
    pub observer: String,
}

impl Default for Bridge {
    fn default() -> Self {
        Self { interface: "br0".into(), observer: "observer0".into() }
    }
}

/// Runs `ip` in the namespace of the caller.
pub(crate) fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output().context("running ip")?;
    check("ip", &arguments.join(" "), &output)
}

/// Joins the two namespaces with a veth pair whose ends have the same name.
pub(crate) fn join(namespaces: &[String; 2], interface: &str, mtu: u32) -> Result<()> {
    let [a, b] = namespaces;
    batch(
        "ip",
        &[],
        &format!(
            "link add {interface} mtu {mtu} netns {a} type veth peer name {interface} mtu {mtu} netns {b}\n"
        ),
    )
}

/// Gives a tun interface the settings that the ends of a veth pair have.
pub(crate) fn prepare_tun(namespace: &str, interface: &str, mtu: u32) -> Result<()> {
    ip(&["-netns", namespace, "link", "set", interface, "mtu", &mtu.to_string(), "txqueuelen", "1000"])
}

/// Gives the links their addresses and brings them up, and the loopback interface too.
pub(crate) fn bring_up(namespace: &str, links: &[(&str, Ipv4Addr)]) -> Result<()> {
    let mut lines = String::from("link set lo up\n");
    for (interface, address) in links {
        writeln!(lines, "address add {address}/24 dev {interface}\nlink set {interface} up")?;
    }
    batch("ip", &["-netns", namespace], &lines)
}

/// Makes a bridge that serves only as a switch.
pub(crate) fn add_switch(namespace: &str, name: &str) -> Result<()> {
    let lines = format!("link add {name} type bridge mcast_snooping 0\nlink set {name} up\n");
    batch("ip", &["-netns", namespace], &lines)
}

/// Adds a port to a switch. The other end of its cable is `interface` in the namespace `other`.
pub(crate) fn add_switch_port(
    namespace: &str,
    switch: &str,
    port: &str,
    other: &str,
    interface: &str,
) -> Result<()> {
    let lines = format!("link add {port} type veth peer name {interface} netns {other}\n");
    batch("ip", &["-netns", namespace], &lines)?;
    enslave(namespace, port, switch)
}

/// Makes `interface` a port of `bridge`, and brings it up.
pub(crate) fn enslave(namespace: &str, interface: &str, bridge: &str) -> Result<()> {
    let lines = format!("link set {interface} master {bridge}\nlink set {interface} up\n");
    batch("ip", &["-netns", namespace], &lines)
}

/// Makes a tap that stays when no program has it open.
pub(crate) fn add_tap(namespace: &str, name: &str) -> Result<()> {
    ip(&["-netns", namespace, "tuntap", "add", "dev", name, "mode", "tap"])
}

/// Makes the bridge and its observer. The other end of the observer is a port of the bridge, so everything that the
/// bridge floods arrives there, as at a switch.
pub(crate) fn add_bridge(namespace: &str, bridge: &Bridge) -> Result<()> {
    let Bridge { interface, observer } = bridge;
    // Without snooping the bridge sends no IGMP reports of its own.
    let lines = format!(
        "link add {interface} type bridge mcast_snooping 0\n\
         link add {observer} type veth peer name {interface}-uplink\n\
         link set {interface}-uplink master {interface}\n\
         link set {interface}-uplink up\n\
         link set {observer} up\n\
         link set {interface} up\n"
    );
    batch("ip", &["-netns", namespace], &lines)
}

pub(crate) fn set_link(namespace: &str, interface: &str, up: bool) -> Result<()> {
    ip(&["-netns", namespace, "link", "set", interface, if up { "up" } else { "down" }])
}

/// Limits what `interface` sends; see tc-htb(8).
pub(crate) fn shape(namespace: &str, interface: &str, rate: Option<Rate>) -> Result<()> {
    let shaped = is_shaped(namespace, interface)?;
    let mut lines = String::new();
    match rate {
        Some(rate) => {
            if !shaped {
                writeln!(lines, "qdisc add dev {interface} root handle 1: htb default 1")?;
            }
            let burst_bytes = burst_bytes(rate);
            // The quantum only matters between classes, of which there is one; given, it spares a kernel warning.
            // Replacing the class alone keeps the packets that are queued.
            writeln!(
                lines,
                "class replace dev {interface} parent 1: classid 1:1 htb rate {rate} ceil {rate} \
                 burst {burst_bytes} cburst {burst_bytes} quantum 65536"
            )?;
        }
        None if shaped => writeln!(lines, "qdisc delete dev {interface} root")?,
        None => return Ok(()),
    }
    batch("tc", &["-netns", namespace], &lines)
}

/// Makes everything that `interface` sends disappear without an error, or lets it pass again. Its rate limit stays.
pub(crate) fn silence(namespace: &str, interface: &str, silent: bool) -> Result<()> {
    let parent = if is_shaped(namespace, interface)? { "parent 1:1" } else { "root" };
    let line = match silent {
        true => format!("qdisc replace dev {interface} {parent} blackhole\n"),
        false => format!("qdisc delete dev {interface} {parent}\n"),
    };
    batch("tc", &["-netns", namespace], &line)
}

fn is_shaped(namespace: &str, interface: &str) -> Result<bool> {
    let arguments = ["-netns", namespace, "qdisc", "show", "dev", interface, "root"];
    let output = Command::new("tc").args(arguments).output().context("running tc")?;
    check("tc", &arguments.join(" "), &output)?;
    Ok(String::from_utf8_lossy(&output.stdout).starts_with("qdisc htb "))
}

/// Returns the burst for a rate, in bytes. A burst must hold the largest packet that the stack hands over, with
/// segmentation left to the device (64 KiB), or HTB falls behind the rate. It must also hold what arrives between two
/// turns of a queue that is served late, here 1 ms.
fn burst_bytes(rate: Rate) -> u64 {
    (rate.bits_per_second() / 8 / 1000).max(2 * 65536)
}

/// Keeps a namespace quiet, without neighbour discovery and router solicitations between the frames that a test
/// captures. It must be called inside the namespace.
pub(crate) fn disable_ipv6() -> io::Result<()> {
    for scope in ["all", "default"] {
        match fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {} // a kernel without IPv6
            result => result?,
        }
    }
    Ok(())
}

/// Runs `program` once for all `lines`.
fn batch(program: &str, options: &[&str], lines: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(options)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {program}"))?;
    let mut stdin = child.stdin.take().expect("stdin was asked to be a pipe");
    // If the program ends early the write fails, and its own message says why.
    let _ = stdin.write_all(lines.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().with_context(|| format!("waiting for {program}"))?;
    check(program, lines, &output)
}

fn check(program: &str, what: &str, output: &Output) -> Result<()> {
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{program} failed with {}: {}\n{}", output.status, stderr.trim(), what.trim());
    }
    Ok(())
}
