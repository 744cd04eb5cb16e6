//! The table: each number beside its target.

#[derive(Debug, Default)]
pub struct Report(Vec<[String; 3]>);

impl Report {
    pub fn row(&mut self, what: &str, measured: impl Into<String>, target: &str) {
        let measured = measured.into();
        println!("   => {what}: {measured}");
        self.0.push([what.to_owned(), measured, target.to_owned()]);
    }

    pub fn print(&self) {
        let titles = ["", "measured", "target"].map(str::to_owned);
        let width = |column: usize| {
            self.0.iter().chain([&titles]).map(|row| row[column].chars().count()).max().unwrap_or_default()
        };
        let (what, measured, target) = (width(0), width(1), width(2));
        let line = |[a, b, c]: &[String; 3]| println!("| {a:what$} | {b:>measured$} | {c:>target$} |");
        println!();
        line(&titles);
        println!("|{}|{}:|{}:|", "-".repeat(what + 2), "-".repeat(measured + 1), "-".repeat(target + 1));
        self.0.iter().for_each(line);
    }
}
