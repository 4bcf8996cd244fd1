//! Tables and messages on the terminal.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use memlane_api::json::to_json;
use memlane_api::types::{CheckReport, GuestInfo, Migration, PeerInfo, PortInfo, Postcopy, Severity, Status};
use memlane_protocol::wire::plain_lines;
use serde::Serialize;

use crate::{summary, units};

/// Writes a line to stdout, without characters that a terminal would obey. If the reader has gone away the program
/// continues, because an order may be under way.
pub(crate) fn line(text: &str) {
    let _ = writeln!(std::io::stdout(), "{}", plain_lines(text));
}

/// Writes a line to stderr, without characters that a terminal would obey.
pub(crate) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{}", plain_lines(text));
}

/// Writes a value to stdout as one line of JSON.
pub(crate) fn json(value: &impl Serialize) {
    line(&to_json(value));
}

fn encryption(status: &Status) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    match status.certificate_expires_seconds.map(|expires| (expires - now) / 86_400.0) {
        _ if status.insecure => "NONE: plain TCP between hosts (insecure = true)".to_owned(),
        Some(days) if days <= 0.0 => "TLS 1.3; this host's certificate has EXPIRED".to_owned(),
        Some(days) => format!("TLS 1.3; this host's certificate is valid for {days:.0} more days"),
        None => "on".to_owned(),
    }
}

/// Describes the daemon, its peers, and the migrations under way.
pub(crate) fn status(status: &Status, peers: &[PeerInfo], migrations: &[Migration]) -> String {
    let [oldest, newest] = status.protocol_versions;
    let versions = if oldest == newest { oldest.to_string() } else { format!("{oldest} to {newest}") };
    let rows = [
        ("daemon", format!("memlaned {}, up for {}", status.version, units::seconds(status.uptime_seconds))),
        ("protocol", format!("version {versions}")),
        ("kernel", format!("{}, {}", status.kernel, if status.kvm { "with KVM" } else { "no KVM" })),
        ("encryption", encryption(status)),
        ("guests", status.guests.to_string()),
        ("peers", if peers.is_empty() { "none configured".to_owned() } else { names(peers) }),
        ("migrations", format!("{} under way", status.migrations)),
    ];
    let mut text = status.host.clone();
    for (name, value) in rows {
        text.push_str(&format!("\n  {name:<10}  {value}"));
    }
    for migration in migrations.iter().filter(|migration| migration.outcome.is_none()) {
        let Migration { id, guest, host, phase, .. } = migration;
        text.push_str(&format!("\n    {guest} → {host}: {phase}  ({id})"));
        if let Some(what) = &migration.waits_for {
            let doubt = migration.in_doubt_since_unix_seconds.map_or(String::new(), |since| {
                format!("in doubt for {}; ", units::seconds((units::now() - since).max(0.0)))
            });
            text.push_str(&format!("\n      {doubt}waits for {what}"));
        }
        for port in summary::lost_ports(migration) {
            text.push_str(&format!(
                "\n      port {port} is lost; the others carry its share, and it is tried again"
            ));
        }
        if let Some(Postcopy { waits_for, remaining_pages, lost_if, .. }) = &migration.postcopy {
            let missing = units::plural(*remaining_pages, "page");
            let waits = waits_for.as_ref().map_or(String::new(), |what| format!("; waits for {what}"));
            text.push_str(&format!("\n      {missing} missing{waits}"));
            if let Some(what) = lost_if {
                text.push_str(&format!("\n      {guest} is lost if {what}"));
            }
        }
    }
    text
}

/// Lists the ports that are lent to migrations.
pub(crate) fn ports(ports: &[PortInfo]) -> String {
    if ports.is_empty() {
        return "no ports are configured: nothing can move. Add [[port]] to the daemon's configuration"
            .to_owned();
    }
    let rows = ports.iter().map(|port| {
        vec![
            port.name.clone(),
            port.address.clone(),
            port.interface.clone().unwrap_or_else(|| "any".to_owned()),
            if port.up { "up" } else { "down" }.to_owned(),
            port.speed_bits_per_second.map_or("unknown".to_owned(), |speed| units::bits(speed as f64)),
            port.lanes.to_string(),
            units::bytes(port.bytes_sent),
            units::bytes(port.bytes_received),
        ]
    });
    table(&["port", "address", "interface", "link", ">speed", ">lanes", ">sent", ">received"], rows)
}

/// Lists the attached guests.
pub(crate) fn guests(guests: &[GuestInfo]) -> String {
    if guests.is_empty() {
        return "no guests are attached".to_owned();
    }
    // Where no guest is in QEMU, these columns would have nothing to say.
    let in_qemu = guests.iter().any(|guest| guest.machine.is_some() || guest.qmp.is_some());
    let dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let rows = guests.iter().map(|guest| {
        let networks: Vec<&str> = guest.nics.iter().map(|nic| nic.network.as_str()).collect();
        let mut row = vec![
            guest.name.clone(),
            guest.standing.to_string(),
            guest.vcpus.to_string(),
            units::bytes(guest.ram_bytes),
            guest.tracker.clone(),
            guest.vmm.clone(),
            dash(guest.pid.map(|pid| pid.to_string())),
            dash((!networks.is_empty()).then(|| networks.join(","))),
        ];
        if in_qemu {
            row.extend([dash(guest.machine.clone()), dash(guest.qmp.clone())]);
        }
        row
    });
    let mut titles = vec!["guest", "standing", ">vcpus", ">ram", "tracker", "vmm", ">pid", "networks"];
    if in_qemu {
        titles.extend(["machine", "qmp"]);
    }
    table(&titles, rows)
}

/// Describes the process that runs a guest, as lines below its name.
pub(crate) fn vmm(guest: &GuestInfo) -> String {
    let of = |machine: &String| format!(" of machine type {machine}");
    let machine = guest.machine.as_ref().map_or(String::new(), of);
    let pid = guest.pid.map_or("unknown".to_owned(), |pid| pid.to_string());
    let mut text = format!("  process  {pid} ({}{machine}, {})", guest.vmm, units::bytes(guest.ram_bytes));
    if let Some(qmp) = &guest.qmp {
        text.push_str(&format!("\n  monitor  {qmp}"));
    }
    text
}

/// Describes the result of a dry run.
pub(crate) fn report(report: &CheckReport) -> String {
    let CheckReport { guest, host, .. } = report;
    let mut text = match report.ok {
        true => format!("{guest} can move to {host}."),
        false => format!("{guest} cannot move to {host}:"),
    };
    for finding in &report.findings {
        let mark = match finding.severity {
            Severity::Ok => "ok     ",
            Severity::Warning => "warning",
            Severity::Refused => "REFUSED",
        };
        text.push_str(&format!("\n  {mark}  {}: {}", finding.what, finding.detail));
        if let (Severity::Warning | Severity::Refused, Some(remedy)) = (finding.severity, &finding.remedy) {
            text.push_str(&format!("\n           {remedy}"));
        }
    }
    for port in &report.ports {
        let reached = match (port.reachable, port.round_trip_seconds) {
            (false, _) => "not reachable".to_owned(),
            (true, None) => "reachable".to_owned(),
            (true, Some(seconds)) => format!("reachable, round trip {}", units::seconds(seconds)),
        };
        text.push_str(&format!("\n  port {} → {}: {reached}", port.port, port.peer_port));
    }
    let estimate = &report.estimate;
    let (data, ram) = (units::bytes(estimate.data_bytes), units::bytes(estimate.ram_bytes));
    text.push_str(&format!("\n  {data} of {ram} RAM to send"));
    if let (Some(rate), Some(seconds)) = (estimate.bytes_per_second, estimate.seconds) {
        let (rate, seconds) = (units::rate(rate), units::seconds(seconds));
        text.push_str(&format!(", about {seconds} at {rate}, and more if the guest writes meanwhile"));
    }
    if let Some(bytes) = estimate.state_bytes {
        let state = units::bytes(bytes);
        text.push_str(&format!(
            "\n  up to {state} of devices' state and video memory, most of it before the pause"
        ));
    }
    text
}

fn names(peers: &[PeerInfo]) -> String {
    let peers: Vec<String> = peers.iter().map(|peer| format!("{} ({})", peer.name, peer.control)).collect();
    peers.join(", ")
}

/// Aligns columns. A title that begins with `>` is of numbers, which are aligned to the right.
fn table(titles: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let title_row = titles.iter().map(|title| title.trim_start_matches('>').to_uppercase()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(title_row).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let align = |row: &Vec<String>| {
        let cells = row.iter().zip(titles).zip(&widths).map(|((cell, title), width)| {
            if title.starts_with('>') { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(align).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use memlane_api::types::{Estimate, Finding, PortCheck};

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["a".to_owned(), "5".to_owned()], vec!["long".to_owned(), "1000".to_owned()]];
        assert_eq!(table(&["name", ">n"], rows.into_iter()), "NAME     N\na        5\nlong  1000");
    }

    #[test]
    fn a_refusal_says_why_and_what_to_do() {
        let refused = CheckReport {
            ok: false,
            guest: "web1".to_owned(),
            host: "host-b".to_owned(),
            findings: vec![Finding {
                severity: Severity::Refused,
                what: "memory".to_owned(),
                detail: "host-b has 1 GiB free, web1 needs 2 GiB".to_owned(),
                remedy: Some("free memory at host-b".to_owned()),
            }],
            ports: vec![PortCheck {
                port: "a".to_owned(),
                peer_port: "a".to_owned(),
                reachable: true,
                round_trip_seconds: Some(0.000_2),
            }],
            estimate: Estimate {
                ram_bytes: 2 << 30,
                data_bytes: 1 << 30,
                state_bytes: Some(17 << 20),
                bytes_per_second: Some(1.25e9),
                seconds: Some(0.86),
            },
        };
        assert_eq!(
            report(&refused),
            "web1 cannot move to host-b:\n  \
             REFUSED  memory: host-b has 1 GiB free, web1 needs 2 GiB\n           \
             free memory at host-b\n  \
             port a → a: reachable, round trip 200 µs\n  \
             1.00 GiB of 2.00 GiB RAM to send, about 860 ms at 10.0 Gbit/s, and more if the guest writes meanwhile\n  \
             up to 17.0 MiB of devices' state and video memory, most of it before the pause"
        );
    }
}
