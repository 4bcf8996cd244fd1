//! What the demo has to tell, for people and for programs.

use std::fmt::Write;

use serde_json::{Value, json};

/// One move.
pub struct Leg {
    /// Its number, from 1.
    pub number: u32,
    /// The migration, as the API shows it at its end.
    pub migration: Value,
    /// What the guest had seen when it arrived.
    pub stats: Value,
    /// How its memory compares with the model.
    pub oracle: Value,
}

/// The whole demo.
pub struct Demo {
    /// The guest.
    pub guest: Value,
    /// The moves.
    pub legs: Vec<Leg>,
    /// One more move in which digests were compared.
    pub proof: Option<Value>,
    /// The downtime limit of the orders.
    pub limit: String,
}

impl Leg {
    /// Whether the guest arrived whole.
    pub fn is_good(&self) -> bool {
        self.migration["outcome"] == "completed" && self.oracle["equal"] == true
    }

    fn json(&self) -> Value {
        let migration = &self.migration;
        let mut leg = json!({
            "leg": self.number,
            "oracle_verified": self.oracle["equal"] == true,
            "guest_longest_stall_seconds": seconds(&self.stats["longest_stall_ns"]),
            "tracking_stall_seconds": seconds(&self.stats["tracking_stall_ns"]),
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
        leg
    }
}

impl Demo {
    /// Whether everything went well.
    pub fn is_good(&self) -> bool {
        self.legs.iter().all(Leg::is_good) && self.digest_verified() != Some(false)
    }

    fn last(&self) -> &Leg {
        self.legs.last().expect("a demo has at least one move")
    }

    fn digest_verified(&self) -> Option<bool> {
        let of = |migration: &Value| migration["digest_verified"].as_bool();
        match &self.proof {
            Some(proof) => Some(of(proof) == Some(true) && proof["outcome"] == "completed"),
            None => of(&self.last().migration),
        }
    }

    /// One object: the last leg, the guest, and all legs if there are several.
    pub fn json(&self) -> Value {
        let mut object = self.last().json();
        let mut guest = self.guest.clone();
        guest["ram_bytes"] = json!(self.ram_bytes());
        object["guest"] = guest;
        object["digest_verified"] = json!(self.digest_verified());
        if self.legs.len() > 1 {
            object["legs"] = self.legs.iter().map(Leg::json).collect();
        }
        object
    }

    fn ram_bytes(&self) -> u64 {
        self.last().migration["pages_total"].as_u64().unwrap_or(0) * 4096
    }

    /// A report that a person enjoys reading.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let (leg, guest) = (self.last(), &self.guest);
        let migration = &leg.migration;
        let kind = if guest["kind"] == "kvm" { "a KVM guest" } else { "a process" };
        let vcpus = guest["vcpus"].as_u64().unwrap_or(0);
        let writes = match guest["dirty_rate"].as_u64() {
            Some(0) => "idle".to_owned(),
            Some(rate) => format!("writing {} pages a second", thousands(rate)),
            None => "writing as fast as it can".to_owned(),
        };
        writeln!(text)?;
        writeln!(
            text,
            "  {} · {kind} of {} with {vcpus} vCPU{}, {writes}, tracked by {}",
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
        writeln!(text, "  moved to {} in {}", migration["host"].as_str().unwrap_or_default(), time(total))?;
        write_rounds(text, migration)?;
        write_lanes(text, migration, total)?;
        writeln!(text)?;
        self.write_pause(text, leg)?;
        self.write_proof(text, leg)
    }

    fn write_pause(&self, text: &mut String, leg: &Leg) -> std::fmt::Result {
        let migration = &leg.migration;
        let value = |key: &str| migration[key].as_f64().map_or("—".to_owned(), time);
        writeln!(
            text,
            "  it stood still for {}; {} was predicted, {} allowed",
            value("downtime_seconds"),
            value("downtime_predicted_seconds"),
            self.limit,
        )?;
        let stall = |key: &str| seconds(&leg.stats[key]).as_f64().map_or("—".to_owned(), time);
        writeln!(
            text,
            "  its own clock says {} at the longest, and {} when its writes began to be tracked",
            stall("longest_stall_ns"),
            stall("tracking_stall_ns"),
        )?;
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

    fn write_proof(&self, text: &mut String, leg: &Leg) -> std::fmt::Result {
        writeln!(text)?;
        let pages = leg.oracle["pages"].as_u64().unwrap_or(0);
        let steps = leg.oracle["steps"].as_u64().unwrap_or(0);
        let (pages, steps) = (thousands(pages), thousands(steps));
        if leg.oracle["equal"] == true {
            writeln!(
                text,
                "  ✔ {pages} pages equal the model after {steps} writes, some of them made on arrival"
            )?;
        } else {
            writeln!(text, "  ✘ memory differs from the model: {}", leg.oracle["differences"])?;
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

/// Nanoseconds as seconds; `null` stays `null`.
fn seconds(nanoseconds: &Value) -> Value {
    nanoseconds.as_f64().map_or(Value::Null, |nanoseconds| json!(nanoseconds / 1e9))
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.0} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

fn binary(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 => format!("{:.2} GiB", b as f64 / (1u64 << 30) as f64),
        b if b >= 1 << 20 => format!("{:.1} MiB", b as f64 / (1u64 << 20) as f64),
        b => format!("{:.1} KiB", b as f64 / 1024.0),
    }
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0.000_05, 0.0123, 1.5].map(time), ["50 µs", "12.3 ms", "1.50 s"]);
        assert_eq!([512, 3 << 20, 3 << 29].map(binary), ["0.5 KiB", "3.0 MiB", "1.50 GiB"]);
    }

    #[test]
    fn a_move_that_lost_something_is_not_good() {
        let leg = |equal: bool| Leg {
            number: 1,
            migration: json!({"outcome": "completed", "pages_total": 256}),
            stats: json!({"longest_stall_ns": 5_000_000}),
            oracle: json!({"equal": equal, "pages": 256, "steps": 10}),
        };
        let demo = |leg, proof| Demo { guest: json!({}), legs: vec![leg], proof, limit: "300ms".into() };
        let equal = json!({"outcome": "completed", "digest_verified": true});
        assert!(demo(leg(true), Some(equal.clone())).is_good());
        assert!(!demo(leg(false), Some(equal)).is_good());
        assert!(!demo(leg(true), Some(json!({"outcome": "failed", "digest_verified": false}))).is_good());
        let json = demo(leg(true), None).json();
        assert_eq!(json["guest_longest_stall_seconds"], 0.005);
        assert_eq!(json["tracking_stall_seconds"], Value::Null);
        assert_eq!(json["guest"]["ram_bytes"], 1 << 20);
    }
}
