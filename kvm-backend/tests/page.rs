//! The page for authors of VMMs shows the example as it is.

const PAGE: &str = include_str!("../../docs/vmm-authors.md");
const EXAMPLE: &str = include_str!("../examples/smallest_vmm.rs");

/// The blocks of Rust on the page, in order, with an empty line between two.
fn shown() -> String {
    let blocks = PAGE.split("```rust\n").skip(1).map(|rest| rest.split("```").next().unwrap_or_default());
    blocks.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_page_shows_all_of_the_example() {
    let shown = shown();
    let differs = shown.lines().zip(EXAMPLE.lines()).position(|(shown, is)| shown != is);
    let line = differs.unwrap_or(shown.lines().count().min(EXAMPLE.lines().count())) + 1;
    assert!(
        shown == EXAMPLE,
        "docs/vmm-authors.md is to show kvm-backend/examples/smallest_vmm.rs in pieces that make up the whole file, \
         with an empty line between two; they differ at line {line} of the file"
    );
}
