"""What a run's folder says, as one HTML file and as advice: facts → charts and sentences → page."""
