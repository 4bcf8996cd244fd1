//! The journal of a host, and its API.

use std::collections::BTreeMap;

use memlane_api::json::to_json;
use memlane_api::types::{
    ApiError, Attach, CheckReport, Compression, Converge, ErrorBody, ErrorCode, Finding, GuestInfo, Launch,
    Migration, NicInfo, Order, Outcome, PeerInfo, PortInfo, Resolution, Resolve, Severity, Standing, Status,
    WhenPostcopy,
};
use memlane_net::journal::{Contents, Entry, VmmIdentity};
use memlane_protocol::handover::Record;

use super::{Seeds, named};

fn entry(number: u8, record: Record) -> Entry {
    Entry {
        migration: [number; 16],
        guest: "web1".parse().unwrap(),
        peer: "host-b".parse().unwrap(),
        vmm: VmmIdentity { pid: 4711, started: 1 << 40 },
        shape: 0x0123_4567_89ab_cdef,
        record,
        fetching: record == Record::Running,
    }
}

pub(super) fn journal() -> Seeds {
    let file = |first, records: &[Record]| {
        let entries = records.iter().zip(1..).map(|(record, number)| entry(number, *record));
        let entries: BTreeMap<_, _> = entries.map(|entry| (entry.key(), entry)).collect();
        let (slots, taken) = (records.len() as u64 + 2, records.len() as u64 + 1);
        Contents { id: [7; 16], first, slots, taken, entries }.file()
    };
    let source = [
        Record::Leaving,
        Record::Committed,
        Record::Finished,
        Record::Lost,
        Record::GivenUp,
        Record::TakenBack,
    ];
    let committed = file(1, &[Record::Committed]);
    let earlier = "{\"migration\":\"07070707070707070707070707070707\",\"guest\":\"web1\",\"peer\":\"host-b\",\
         \"pid\":4711,\"started\":99,\"record\":\"committed\"}\n\
         {\"migration\":\"08080808080808080808080808080808\",\"guest\":\"db\",\"peer\":\"host-b\",\"record\":null}\n\0\0\0";
    named([
        ("empty", file(1, &[])),
        ("source", file(40, &source)),
        ("destination", file(u64::MAX - 1, &[Record::Prepared, Record::Running, Record::Declined])),
        ("cut", committed[..committed.len() - 512].to_vec()),
        ("earlier", earlier.as_bytes().to_vec()),
    ])
}

pub(super) fn api() -> Seeds {
    let order = Order { guest: "web1".into(), host: "host-b".into(), ..Order::default() };
    let whole = Order {
        downtime_limit_seconds: Some(0.3),
        min_bandwidth_bits_per_second: Some(1_000_000_000),
        max_rounds: Some(30),
        converge: Some(Converge::Stun),
        max_stun_percent: Some(80),
        postcopy: Some(WhenPostcopy::Hybrid),
        compression: Some(Compression::Auto),
        ..order.clone()
    };
    let attach = Attach { name: "web1".into(), qmp: "/run/web1.qmp".into(), incoming: true };
    let launch = Launch { definition: "name = \"web1\"\nmemory = \"2GiB\"\n".into(), incoming: false };
    let finding = Finding {
        severity: Severity::Refused,
        what: "memory".into(),
        detail: "2 GiB are needed".into(),
        remedy: None,
    };
    let report = CheckReport { findings: vec![finding], ..CheckReport::default() };
    let migration = Migration { outcome: Some(Outcome::Failed), ..Migration::new("07", "web1", "host-b") };
    let guest = GuestInfo {
        name: "web1".into(),
        vmm: "qemu".into(),
        machine: Some("pc-q35-7.2".into()),
        vcpus: 2,
        ram_bytes: 2 << 30,
        tracker: "pagemap".into(),
        standing: Standing::Running,
        nics: vec![NicInfo::default()],
        pid: Some(4711),
        qmp: None,
    };
    let error = ApiError::new(ErrorCode::UnknownGuest, "no guest \u{1b}[2J is here");
    named([
        ("order", to_json(&order)),
        ("order-whole", to_json(&whole)),
        ("order-verify", to_json(&Order { verify: true, postcopy: Some(WhenPostcopy::Now), ..order })),
        ("order-limit", "{\"guest\": \"web1\", \"host\": \"b\", \"downtime_limit_seconds\": 1e9}".to_owned()),
        ("order-unknown", "{\"guest\": \"web1\", \"host\": \"b\", \"converge\": \"\\u001b[2J\"}".to_owned()),
        ("resolve", to_json(&Resolve { action: Resolution::RunHere, other_host_is_off: true })),
        ("resolve-unpromised", "{\"action\": \"run_here\"}".to_owned()),
        ("resolve-discard", "{\"action\": \"discard\"}".to_owned()),
        ("attach", to_json(&attach)),
        ("attach-wrong", to_json(&Attach { qmp: "qmp".into(), ..attach })),
        ("launch", to_json(&launch)),
        ("status", to_json(&Status::default())),
        ("migration", to_json(&migration)),
        ("report", to_json(&report)),
        ("ports", to_json(&[PortInfo::default()])),
        ("peers", to_json(&[PeerInfo::default()])),
        ("guests", to_json(&[guest])),
        ("error", to_json(&ErrorBody { error })),
    ])
}
