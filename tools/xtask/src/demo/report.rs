//! The demo's report, for people and for programs.

use std::fmt::Write;

use memlane_lab::Readers;
use serde_json::{Value, json};

use super::converge;
use super::format::{binary, seconds, thousands, time};

/// One move.
pub(crate) struct DemoMove {
    /// The number of the move, from 1.
    pub number: u32,
    /// The migration, as the API shows it at its end.
    pub migration: Value,
    /// The statistics of the guest when it arrived.
    pub stats: Value,
    /// The result of the comparison of the guest's memory with the model.
    pub oracle: Value,
    /// The effect of the move on vCPUs that only read, if the guest has any.
    pub readers: Option<Readers>,
    /// Further figures: an object whose keys are added to those of the move.
    pub more: Value,
}

/// The whole demo.
pub(crate) struct DemoReport {
    /// The guest.
    pub guest: Value,
    /// The moves.
    pub legs: Vec<DemoMove>,
    /// One more move in which digests were compared.
    pub proof: Option<Value>,
    /// What each host is, if it is a system of its own.
    pub hosts: Option<Value>,
    /// The downtime limit of the orders.
    pub limit: String,
    /// Whether the traffic between the hosts was encrypted.
    pub encrypted: bool,
}

impl DemoMove {
    /// Returns whether the guest arrived whole.
    pub(crate) fn is_whole(&self) -> bool {
        self.migration["outcome"] == "completed" && self.oracle["equal"] == true
    }

    /// Returns whether the guest arrived whole, and its client and the switch know where it is.
    pub(crate) fn is_good(&self) -> bool {
        let holds = |key: &str| self.more.get(key).is_none_or(|value| value == true);
        self.is_whole() && holds("tcp_session_survived") && holds("switch_learned_port")
    }

    fn json(&self) -> Value {
        let migration = &self.migration;
        let mut leg = json!({
            "leg": self.number,
            "oracle_verified": self.oracle["equal"] == true,
            "guest_longest_stall_seconds": seconds(&self.stats["longest_stall_ns"]),
            "tracking_stall_seconds": seconds(&self.stats["tracking_stall_ns"]),
            "stun": converge::stun(migration, self.readers.as_ref()),
            "postcopy": converge::postcopy(migration),
            "readers": self.readers.as_ref().map(Readers::json),
        });
        for key in [
            "outcome",
            "reason",
            "host",
            "total_seconds",
            "downtime_seconds",
            "downtime_predicted_seconds",
            "downtime_limit_seconds",
            "forecast",
            "digest_verified",
            "rounds",
            "lanes",
            "bytes_sent",
            "pages_sent",
            "zero_pages",
            "hole_pages",
            "tracking_start_seconds",
            "vmm_state_bytes",
            "save_seconds",
            "load_seconds",
        ] {
            leg[key] = migration[key].clone();
        }
        for (key, value) in self.more.as_object().into_iter().flatten() {
            leg[key] = value.clone();
        }
        leg
    }
}

impl DemoReport {
    /// Returns whether everything went well.
    pub(crate) fn is_good(&self) -> bool {
        self.legs.iter().all(DemoMove::is_good) && self.digest_verified() != Some(false)
    }

    fn last(&self) -> &DemoMove {
        self.legs.last().expect("a demo has at least one move")
    }

    fn digest_verified(&self) -> Option<bool> {
        let of = |migration: &Value| migration["digest_verified"].as_bool();
        match &self.proof {
            Some(proof) => Some(of(proof) == Some(true) && proof["outcome"] == "completed"),
            None => of(&self.last().migration),
        }
    }

    /// Returns one object: the last move, the guest, and all moves if there are several.
    pub(crate) fn json(&self) -> Value {
        let mut object = self.last().json();
        let mut guest = self.guest.clone();
        guest["ram_bytes"] = json!(self.ram_bytes());
        object["guest"] = guest;
        object["digest_verified"] = json!(self.digest_verified());
        object["encrypted"] = json!(self.encrypted);
        if let Some(hosts) = &self.hosts {
            object["hosts"] = hosts.clone();
        }
        if self.legs.len() > 1 {
            object["legs"] = self.legs.iter().map(DemoMove::json).collect();
        }
        object
    }

    fn ram_bytes(&self) -> u64 {
        self.last().migration["pages_total"].as_u64().unwrap_or(0) * 4096
    }

    /// Returns the report for people.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let (leg, guest) = (self.last(), &self.guest);
        let migration = &leg.migration;
        let kind = match guest["kind"].as_str() {
            Some("kvm") => "a KVM guest",
            Some("linux") => "a Linux guest of QEMU",
            _ => "a process",
        };
        let vcpus = guest["vcpus"].as_u64().unwrap_or(0);
        let readers = match guest["readers"].as_u64() {
            None | Some(0) => String::new(),
            Some(readers) => {
                format!(" and {readers} more that only read{}", if readers == 1 { "s" } else { "" })
            }
        };
        let writes = match guest["dirty_rate"].as_u64() {
            Some(0) => "idle".to_owned(),
            Some(rate) => format!("writing {} pages a second", thousands(rate)),
            None => "writing as fast as it can".to_owned(),
        };
        let accelerator = guest["accelerator"].as_str().map(|name| format!(" ({name})")).unwrap_or_default();
        writeln!(text)?;
        writeln!(
            text,
            "  {} · {kind}{accelerator} of {} with {vcpus} vCPU{}{readers}, {writes}, tracked by {}",
            guest["name"].as_str().unwrap_or_default(),
            binary(self.ram_bytes()),
            if vcpus == 1 { "" } else { "s" },
            guest["tracker"].as_str().unwrap_or_default(),
        )?;
        writeln!(text)?;
        if migration["outcome"] != "completed" {
            let reason = migration["reason"].as_str().unwrap_or("no reason was given");
            return writeln!(text, "  It did not move: {reason}");
        }
        let total = migration["total_seconds"].as_f64().unwrap_or(0.0);
        let encrypted = if self.encrypted { "encrypted (TLS 1.3)" } else { "NOT encrypted" };
        let host = migration["host"].as_str().unwrap_or_default();
        writeln!(text, "  moved to {host} in {}, {encrypted}", time(total))?;
        write_rounds(text, migration)?;
        write_lanes(text, migration, total)?;
        writeln!(text)?;
        converge::write(text, migration, leg.readers.as_ref())?;
        self.write_pause(text, leg)?;
        self.write_proof(text, leg)
    }

    fn write_pause(&self, text: &mut String, leg: &DemoMove) -> std::fmt::Result {
        let migration = &leg.migration;
        let value = |key: &str| migration[key].as_f64().map_or("—".to_owned(), time);
        writeln!(
            text,
            "  it stood still for {}; {} was predicted, {} allowed",
            value("downtime_seconds"),
            value("downtime_predicted_seconds"),
            self.limit,
        )?;
        match leg.more.is_object() {
            true => write_client(text, &leg.more)?,
            false => {
                let stall = |key: &str| seconds(&leg.stats[key]).as_f64().map_or("—".to_owned(), time);
                let (longest, tracking) = (stall("longest_stall_ns"), stall("tracking_stall_ns"));
                writeln!(
                    text,
                    "  its own clock says {longest} at the longest, and {tracking} when its writes began to be tracked"
                )?;
            }
        }
        if self.legs.len() > 1 {
            let mut pauses: Vec<f64> =
                self.legs.iter().filter_map(|leg| leg.migration["downtime_seconds"].as_f64()).collect();
            pauses.sort_by(f64::total_cmp);
            if let (Some(median), Some(longest)) = (pauses.get(pauses.len() / 2), pauses.last()) {
                let (median, longest) = (time(*median), time(*longest));
                writeln!(
                    text,
                    "  over {} moves: {median} in the median, {longest} at the longest",
                    pauses.len()
                )?;
            }
        }
        Ok(())
    }

    fn write_proof(&self, text: &mut String, leg: &DemoMove) -> std::fmt::Result {
        writeln!(text)?;
        let number = |key: &str| thousands(leg.oracle[key].as_u64().unwrap_or(0));
        match (leg.oracle["equal"] == true, leg.more.get("guest_checks")) {
            (true, None) => writeln!(
                text,
                "  ✔ {} pages equal the model after {} writes, some of them made on arrival",
                number("pages"),
                number("steps"),
            )?,
            (false, None) => {
                writeln!(text, "  ✘ memory differs from the model: {}", leg.oracle["differences"])?;
            }
            (true, Some(_)) => writeln!(
                text,
                "  ✔ the guest checked pages {} times during and after the move, each of its {} at least once: \
                 none was wrong",
                number("checks"),
                number("pages"),
            )?,
            (false, Some(checks)) => writeln!(text, "  ✘ the guest found its memory wrong: {checks}")?,
        }
        match self.digest_verified() {
            Some(true) => writeln!(text, "  ✔ digests of all memory were equal at both ends in the pause"),
            Some(false) => writeln!(text, "  ✘ digests of memory differed"),
            None => Ok(()),
        }
    }
}

fn write_rounds(text: &mut String, migration: &Value) -> std::fmt::Result {
    for round in migration["rounds"].as_array().into_iter().flatten() {
        let number = |key: &str| round[key].as_u64().unwrap_or(0);
        writeln!(
            text,
            "    round {:<3} {:>11} pages {:>10} {:>9}   {} written meanwhile",
            number("round"),
            thousands(number("pages")),
            binary(number("bytes")),
            time(round["seconds"].as_f64().unwrap_or(0.0)),
            thousands(number("dirtied_pages")),
        )?;
    }
    let holes = migration["hole_pages"].as_u64().unwrap_or(0);
    let zeros = migration["zero_pages"].as_u64().unwrap_or(0);
    writeln!(
        text,
        "    {} pages were holes and {} zero; neither was sent",
        thousands(holes),
        thousands(zeros)
    )
}

/// Writes what the client and the switch of a Linux guest saw.
fn write_client(text: &mut String, more: &Value) -> std::fmt::Result {
    let value = |key: &str| more[key].as_f64().map_or("—".to_owned(), time);
    writeln!(
        text,
        "  {} passed from QEMU's pause here to its first instruction there, for {} of state",
        value("qemu_pause_to_run_seconds"),
        more["qemu_state_bytes"].as_u64().map_or("—".to_owned(), binary),
    )?;
    let survived = if more["tcp_session_survived"] == true { "lives on" } else { "was lost" };
    let gap = value("client_longest_gap_seconds");
    writeln!(text, "  its client waited {gap} for an answer at the longest, and the connection {survived}")?;
    let learned = if more["switch_learned_port"] == true { "learned" } else { "did not learn" };
    writeln!(text, "  the switch {learned} its new port by RARP, before it said anything there")
}

fn write_lanes(text: &mut String, migration: &Value, total: f64) -> std::fmt::Result {
    const WIDTH: f64 = 24.0;
    let lanes: Vec<&Value> = migration["lanes"].as_array().into_iter().flatten().collect();
    let bytes = |lane: &Value| lane["bytes"].as_f64().unwrap_or(0.0);
    let all: f64 = lanes.iter().map(|lane| bytes(lane)).sum();
    for lane in &lanes {
        let share = if all > 0.0 { bytes(lane) / all } else { 0.0 };
        let bar = "█".repeat((share * WIDTH).round() as usize);
        writeln!(
            text,
            "    {:<9} {bar:<24} {:>10}  {:.2} Gbit/s",
            lane["port"].as_str().unwrap_or_default(),
            binary(bytes(lane) as u64),
            bytes(lane) * 8.0 / total.max(1e-9) / 1e9,
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_that_lost_something_is_not_good() {
        let leg = |equal: bool| DemoMove {
            number: 1,
            migration: json!({"outcome": "completed", "pages_total": 256}),
            stats: json!({"longest_stall_ns": 5_000_000}),
            oracle: json!({"equal": equal, "pages": 256, "steps": 10}),
            readers: None,
            more: Value::Null,
        };
        let demo = |leg, proof| DemoReport {
            guest: json!({}),
            legs: vec![leg],
            proof,
            hosts: None,
            limit: "300ms".into(),
            encrypted: true,
        };
        let equal = json!({"outcome": "completed", "digest_verified": true});
        assert!(demo(leg(true), Some(equal.clone())).is_good());
        assert!(!demo(leg(false), Some(equal)).is_good());
        assert!(!demo(leg(true), Some(json!({"outcome": "failed", "digest_verified": false}))).is_good());
        let json = demo(leg(true), None).json();
        assert_eq!(json["guest_longest_stall_seconds"], 0.005);
        assert_eq!(json["tracking_stall_seconds"], Value::Null);
        assert_eq!(json["guest"]["ram_bytes"], 1 << 20);
    }

    #[test]
    fn a_linux_guest_must_keep_its_connection_and_be_found_by_the_switch() {
        let demo = |survived: bool, learned: bool| {
            let leg = DemoMove {
                number: 1,
                migration: json!({"outcome": "completed", "pages_total": 256}),
                stats: Value::Null,
                oracle: json!({"equal": true}),
                readers: None,
                more: json!({
                    "tcp_session_survived": survived,
                    "switch_learned_port": learned,
                    "guest_checks": {"passes": 9, "failures": 0},
                }),
            };
            DemoReport {
                guest: json!({"kind": "linux"}),
                legs: vec![leg],
                proof: None,
                hosts: None,
                limit: "300ms".into(),
                encrypted: true,
            }
        };
        assert!(demo(true, true).is_good());
        assert!(!demo(false, true).is_good() && !demo(true, false).is_good());
        assert_eq!(demo(true, false).json()["switch_learned_port"], false);
        assert!(demo(true, false).text().contains("did not learn"));
    }
}
