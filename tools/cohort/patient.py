"""Simulate a subject's labels from its simulated disease: grades, spirometry, exacerbations, survival."""

import numpy as np

# Thresholds between the visual grades of emphysema: none, trace, mild, moderate, confluent, advanced.
GRADES_AT = (0.07, 0.12, 0.20, 0.34, 0.55)
# Thresholds between the visual grades of paraseptal emphysema: none, mild, substantial.
PARASEPTAL_AT = (0.09, 0.14)
GOLD_AT = (80.0, 50.0, 30.0)  # FEV1 as % of the predicted value; thresholds between GOLD stages 1 to 4


def simulate_patient(rng: np.random.Generator, planted: dict[str, float]) -> dict[str, float]:
    """Draw the labels of a subject, each with measurement noise.

    Labels depend on the subtype and location of disease, not only on density. In the simulation, severe and panlobular
    emphysema reduce lung function more than moderate emphysema of the same extent. Moderate emphysema is simulated to
    reduce lung function three times as much in the lower half of the lungs as in the upper half. Simulated reticulation
    reduces lung function and survival without lowering density. Simulated mild emphysema causes exacerbations
    without lowering the mean density.

    Args:
        rng: random generator for the noise.
        planted: strengths returned by tools.cohort.disease.plant_disease.
    """
    mild, severe = planted["mild_centrilobular_fraction"], planted["severe_centrilobular_fraction"]
    panlobular, reticulation = planted["panlobular_fraction"], planted["reticulation_fraction"]
    upper, lower = planted["upper_centrilobular_fraction"], planted["lower_centrilobular_fraction"]
    by_place = 0.5 * upper + 1.5 * lower
    loss = 0.45 * by_place + 0.6 * severe + 0.9 * panlobular + 0.9 * reticulation  # loss in log10 FEV1
    fev1 = 10 ** float(np.clip(1.99 - loss + rng.normal(0, 0.045), 1.15, 2.12))
    obstruction = 0.35 * by_place + 0.35 * severe + 0.5 * panlobular - 0.25 * reticulation
    ratio = 10 ** float(np.clip(np.log10(0.79) - obstruction + rng.normal(0, 0.02), -0.7, -0.04))
    gold = 0 if ratio >= 0.7 else 1 + int(np.searchsorted(-np.array(GOLD_AT), -fev1))

    visible = 0.3 * mild + planted["moderate_centrilobular_fraction"] + 1.3 * severe + 1.3 * panlobular
    grade = np.searchsorted(GRADES_AT, visible * np.exp(rng.normal(0, 0.1)))
    paraseptal = np.searchsorted(PARASEPTAL_AT, planted["paraseptal_fraction"] * np.exp(rng.normal(0, 0.08)))

    exacerbations = rng.poisson(0.25 * np.exp(3.5 * mild + 3.0 * by_place + 3.0 * reticulation))
    risk = 4.0 * by_place + 5.0 * severe + 5.0 * panlobular + 6.0 * reticulation
    hazard = 0.035 * np.exp(risk + 0.5 * (planted["lesion_diameter_mm"] > 0))  # per year
    death, end = rng.exponential(1 / hazard), rng.uniform(6, 12)
    return {
        "emphysema_grade": int(grade),
        "paraseptal_grade": int(paraseptal),
        "FEV1pp": round(fev1, 1),
        "FEV1_FVC": round(ratio, 3),
        "GOLD": gold,
        "exacerbations": int(exacerbations),
        "survival_years": round(float(min(death, end)), 2),
        "died": int(death <= end),
    }
