//! The table in the documents: rows are kinds of guests, columns are versions of QEMU.

use std::path::{Path, PathBuf};

use memlane_lab::qemu::VERSIONS;

/// With this in the environment, what is seen is written into the table.
const WRITE: &str = "MEMLANE_WRITE_KINDS";
const DOCUMENT: &str = "docs/operating.md";
const BEGIN: &str = "<!-- written by daemon/tests/qemu_kinds -->\n";
const END: &str = "<!-- end of kinds -->\n";

/// What the document says, and what is seen.
pub(crate) struct Table {
    text: String,
    /// A kind, and what comes of its move with each version.
    rows: Vec<(String, [String; VERSIONS.len()])>,
    seen: Vec<(&'static str, String)>,
}

impl Table {
    /// Reads the document.
    pub(crate) fn read() -> Self {
        let text = std::fs::read_to_string(document()).unwrap();
        let rows = text.split_once(BEGIN).and_then(|(_, rest)| rest.split_once(END));
        let rows = rows.unwrap_or_else(|| panic!("{DOCUMENT} has no place for the table: {BEGIN}{END}")).0;
        let rows = rows.lines().filter(|line| line.starts_with("| ")).skip(2).map(|row| {
            let mut columns = row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned());
            let kind = columns.next().unwrap_or_default();
            (kind, std::array::from_fn(|_| columns.next().unwrap_or_default()))
        });
        Self { rows: rows.collect(), seen: Vec::new(), text }
    }

    /// Notes what was seen of a kind. Kinds are noted in the order of the rows.
    pub(crate) fn note(&mut self, kind: &'static str, seen: String) {
        // A bar would end the cell, and an end of a line the table.
        self.seen.push((kind, seen.replace(['|', '\n'], " ")));
    }

    /// Checks that the document says what was seen, with the version of a column; or writes that.
    pub(crate) fn check(self, column: usize) {
        let said = |number: usize| {
            self.rows.get(number).map(|(kind, cells)| (kind.as_str(), cells[column].as_str()))
        };
        if std::env::var_os(WRITE).is_some() {
            return self.write(column);
        }
        let wrong: Vec<String> = self
            .seen
            .iter()
            .enumerate()
            .filter(|(number, (kind, seen))| said(*number) != Some((kind, seen)))
            .map(|(number, (kind, seen))| format!("{kind}: {seen}, and the table says {:?}", said(number)))
            .collect();
        assert!(wrong.is_empty(), "{DOCUMENT} says otherwise ({WRITE}=1 writes it): {wrong:#?}");
        assert_eq!(
            self.rows.len(),
            self.seen.len(),
            "{DOCUMENT} has rows of other kinds ({WRITE}=1 writes it)"
        );
    }

    fn write(self, column: usize) {
        let names = VERSIONS.map(|version| format!("QEMU {}", version.name)).join(" | ");
        let mut rows = format!("| guest | {names} |\n|{}\n", " --- |".repeat(VERSIONS.len() + 1));
        for (number, (kind, seen)) in self.seen.iter().enumerate() {
            let same = self.rows.get(number).filter(|(before, _)| before == kind);
            let mut cells = same.map(|(_, cells)| cells.clone()).unwrap_or_default();
            cells[column] = seen.clone();
            rows += &format!("| {kind} | {} |\n", cells.join(" | "));
        }
        let (before, rest) = self.text.split_once(BEGIN).expect("it was there when it was read");
        let (_, after) = rest.split_once(END).expect("it was there when it was read");
        std::fs::write(document(), format!("{before}{BEGIN}{rows}{END}{after}")).unwrap();
    }
}

fn document() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(DOCUMENT)
}
