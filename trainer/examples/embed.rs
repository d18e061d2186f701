//! Embeds a query and documents, and prints the documents by cosine similarity.
//!
//! ```text
//! cargo run --release --example embed -- MODEL      a model folder, or an id on the Hugging Face hub
//! ```

#![expect(clippy::print_stdout, reason = "an example prints its results")]

use trainer::Result;
use trainer::eval::embed::{LoadedModel, Role};
use trainer::model::Options;

const QUERY: &str = "What is the melting point of iron?";
const DOCUMENTS: [&str; 3] = [
    "Iron melts at 1538 °C.",
    "The Danube flows into the Black Sea.",
    "Steel is an alloy of iron and carbon.",
];

fn main() -> Result<()> {
    let model =
        std::env::args().nth(1).unwrap_or_else(|| "sentence-transformers/all-MiniLM-L6-v2".to_owned());
    for (score, document) in ranking(&model)? {
        println!("{score:.4}  {document}");
    }
    Ok(())
}

/// Returns the documents with their scores, best first.
fn ranking(model: &str) -> Result<Vec<(f32, &'static str)>> {
    let loaded = LoadedModel::open(model, &Options::default())?;
    // Prompts and the maximum length are those of the model folder; set fields of the embedder to change
    // them.
    let embedder = loaded.embedder();
    let query = embedder.encode(&[QUERY], Role::Query)?; // (1, D)
    let documents = embedder.encode(&DOCUMENTS, Role::Document)?; // (N, D)
    // The inner product is the cosine similarity, because the model scales embeddings to length 1.
    let scores = query.matmul(&documents.t()?)?.flatten_all()?.to_vec1::<f32>()?;
    let mut ranking: Vec<(f32, &str)> = scores.into_iter().zip(DOCUMENTS).collect();
    ranking.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(ranking)
}

#[test]
fn documents_are_ranked_by_cosine_similarity() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/bert");
    let ranking = ranking(model).unwrap();
    assert_eq!(ranking.len(), DOCUMENTS.len());
    assert!(ranking.is_sorted_by(|a, b| a.0 >= b.0) && ranking.iter().all(|(score, _)| score.abs() < 1.0001));
}
