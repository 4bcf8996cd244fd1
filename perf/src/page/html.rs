//! The page itself: one file, without anything from elsewhere.

use std::fmt::Write as _;

use crate::picture::{Escaped, Picture, style};

/// A part of the page.
#[derive(Debug, Default)]
pub(super) struct Section {
    pub(super) name: String,
    /// The paragraphs that say what the part is about.
    pub(super) lead: Vec<String>,
    pub(super) figures: Vec<Figure>,
    pub(super) tables: Vec<HtmlTable>,
}

/// A picture with its caption.
#[derive(Debug)]
pub(super) struct Figure {
    pub(super) caption: String,
    pub(super) picture: Picture,
}

/// A table of words and numbers. Cells that look like a number are aligned to the right.
#[derive(Debug, Default)]
pub(super) struct HtmlTable {
    pub(super) heading: String,
    pub(super) head: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
}

/// Returns the whole page.
pub(super) fn page(title: &str, lead: &str, sections: &[Section]) -> String {
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <title>{title}</title>\n<style>{}{}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n<p class=\"soft\">{}</p>\n",
        style::PICTURE,
        style::PAGE,
        Escaped(lead),
        title = Escaped(title),
    );
    if sections.len() > 2 {
        html += "<nav>";
        for section in sections {
            let name = Escaped(&section.name);
            // Writing to a string never fails.
            let _ = write!(html, "<a href=\"#{name}\">{name}</a>");
        }
        html += "</nav>\n";
    }
    for section in sections {
        section.write(&mut html);
    }
    html + "</main>\n</body>\n</html>\n"
}

impl Section {
    fn write(&self, html: &mut String) {
        // Writing to a string never fails.
        let _ = writeln!(html, "<section>\n<h2 id=\"{name}\">{name}</h2>", name = Escaped(&self.name));
        for paragraph in &self.lead {
            let _ = writeln!(html, "<p>{}</p>", Escaped(paragraph));
        }
        for Figure { caption, picture } in &self.figures {
            let _ = writeln!(html, "<figure>\n{}", picture.inline());
            if !caption.is_empty() {
                let _ = writeln!(html, "<figcaption>{}</figcaption>", Escaped(caption));
            }
            html.push_str("</figure>\n");
        }
        for table in &self.tables {
            table.write(html);
        }
        html.push_str("</section>\n");
    }
}

impl HtmlTable {
    fn write(&self, html: &mut String) {
        // Writing to a string never fails.
        let _ = writeln!(html, "<h3>{}</h3>\n<div class=\"wide\">\n<table>", Escaped(&self.heading));
        for (tag, row) in std::iter::once(("th", &self.head)).chain(self.rows.iter().map(|row| ("td", row))) {
            if row.is_empty() {
                continue;
            }
            html.push_str("<tr>");
            for (column, cell) in row.iter().enumerate() {
                let class = if self.is_numeric(column) { " class=\"number\"" } else { "" };
                // Writing to a string never fails.
                let _ = write!(html, "<{tag}{class}>{}</{tag}>", Escaped(cell));
            }
            html.push_str("</tr>\n");
        }
        html.push_str("</table>\n</div>\n");
    }

    fn is_numeric(&self, column: usize) -> bool {
        let cells = || self.rows.iter().filter_map(|row| row.get(column)).filter(|cell| !cell.is_empty());
        let numeric = |cell: &String| cell.starts_with(|c: char| c.is_ascii_digit() || c == '\u{2212}');
        cells().next().is_some() && cells().all(numeric)
    }
}
