//! The table in the documents: rows are faults, columns are phases.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::cell::{Fate, Seen};
use crate::fault::Fault;
use crate::phase::Phase;

/// With this in the environment, what is seen is written into the table, beside what stands there already.
const WRITE: &str = "MEMLANE_WRITE_FAULTS";
const DOCUMENT: &str = "docs/operating.md";
const BEGIN: &str = "<!-- written by daemon/tests/faults -->\n";
const END: &str = "<!-- end -->\n";

/// What the document says of each cell.
pub(crate) struct Table {
    text: String,
    cells: BTreeMap<(Fault, Phase), BTreeSet<String>>,
}

impl Table {
    /// Reads the document.
    pub(crate) fn read() -> Self {
        let text = std::fs::read_to_string(document()).unwrap();
        let rows = text.split_once(BEGIN).and_then(|(_, rest)| rest.split_once(END));
        let rows = rows.unwrap_or_else(|| panic!("{DOCUMENT} has no place for the table: {BEGIN}{END}")).0;
        let mut cells = BTreeMap::new();
        for row in rows.lines().filter(|line| line.starts_with("| ")) {
            let mut columns = row.trim_matches('|').split('|').map(str::trim);
            let heading = columns.next();
            let Some(fault) = Fault::ALL.into_iter().find(|fault| Some(fault.name()) == heading) else {
                continue;
            };
            for (phase, cell) in Phase::ALL.into_iter().zip(columns) {
                let seen = cell.split(" or ").filter(|seen| !seen.is_empty());
                cells.insert((fault, phase), seen.map(str::to_owned).collect());
            }
        }
        Self { text, cells }
    }

    /// Checks that no guest is gone of which the table does not say so. Other answers that the table lacks are said: on another
    /// machine something may win a race that it lost here. If the table is to be written, it is completed.
    pub(crate) fn check(mut self, seen: &BTreeMap<(Fault, Phase), &Seen>) {
        let (mut missing, mut gone) = (Vec::new(), Vec::new());
        for (cell, seen) in seen {
            let known = self.cells.entry(*cell).or_default();
            // When the operator hears of it is another matter. And a guest that has moved ends where it finds no memory.
            let may_be_gone =
                known.iter().any(|known| known.starts_with("gone")) || cell.0 == Fault::DestinationMemoryFull;
            if known.insert(seen.to_string()) {
                let list = if seen.fate == Fate::Gone && !may_be_gone { &mut gone } else { &mut missing };
                list.push(format!("{} / {}: {seen}", cell.0.name(), cell.1.name()));
            }
        }
        if std::env::var_os(WRITE).is_some() {
            self.write();
            return;
        }
        if !missing.is_empty() {
            println!("these answers are not in the table of {DOCUMENT} ({WRITE}=1 adds them): {missing:#?}");
        }
        assert!(gone.is_empty(), "{DOCUMENT} does not say that these guests may be gone: {gone:#?}");
    }

    fn write(&self) {
        let mut rows = String::from("| fails |");
        Phase::ALL.iter().for_each(|phase| rows += &format!(" {} |", phase.name()));
        rows += &format!("\n|{}\n", " --- |".repeat(Phase::ALL.len() + 1));
        for fault in Fault::ALL {
            rows += &format!("| {} |", fault.name());
            for phase in Phase::ALL {
                let seen = self.cells.get(&(fault, phase)).cloned().unwrap_or_default();
                rows += &format!(" {} |", Vec::from_iter(seen).join(" or "));
            }
            rows.push('\n');
        }
        let (before, rest) = self.text.split_once(BEGIN).expect("it was there when it was read");
        let (_, after) = rest.split_once(END).expect("it was there when it was read");
        std::fs::write(document(), format!("{before}{BEGIN}{rows}{END}{after}")).unwrap();
    }
}

fn document() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(DOCUMENT)
}
