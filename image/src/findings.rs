//! What a check of an image found wrong, in words, bounded in number.

/// Findings listed in full; more are only said to be there.
const LISTED_MAX: usize = 100;

/// Adds a finding to a list.
pub(crate) fn add(findings: &mut Vec<String>, text: String) {
    match findings.len() {
        0..LISTED_MAX => findings.push(text),
        LISTED_MAX => findings.push("more errors follow that are not listed".to_owned()),
        _ => {}
    }
}
