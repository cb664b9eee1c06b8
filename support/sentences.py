"""The sentences of phantoms' reports.

Report sentences: wording -> topic -> templates, [this|that] a choice, @name a choice of TERMS. A topic starting with
"!" is the Impression's line. The wordings share no sentence, but every word of the held-out sentences occurs in some
sentence of training: a text model cannot know a word that it never read.
"""
TERMS = {
    "see": "There is|Note is made of|One sees|We see|The scan shows|Images show",
    "see_many": "There are|Note is made of|One sees|We see|The scan shows",
    "seen": "seen|present|noted|identified|found|visible",
    "shows": "shows|contains|holds|has",
    "fluid": "pleural effusion|effusion|pleural fluid collection|collection of pleural fluid",
    "liquid": "fluid|pleural fluid|dependent fluid|free fluid",
    "on_side": "on the {side}|on the {side} side|in the {side} pleural space|within the {side} pleural cavity|"
               "in the {side} hemithorax|within the {side} hemithorax|in the {side} chest",
    "spaces": "pleural spaces|pleural cavities|hemithoraces|sides",
    "amount": "in amount|in size|in extent|in volume",
    "big": "enlarged|markedly enlarged|clearly enlarged|increased in size|bigger than normal|too large",
    "heart": "heart|cardiac silhouette|cardiac shadow",
    "normal": "normal|normal in size|of normal size|not increased|within normal limits|unremarkable",
    "enlargement": "cardiomegaly|cardiac enlargement|enlargement of the heart|increased heart size",
    "bulla": "bullae|bullous changes|thin-walled air spaces|air-filled spaces|cystic air spaces|air cysts",
    "many": "Multiple|Several|Large|Numerous|Many large",
    "upper": "in the upper lobes|in both upper lobes|in the upper lungs|in both apices|in the lung apices|"
             "of the upper lobes",
    "bullous": "Bullous emphysema|Bullous disease|Bullous lung disease|Emphysema with bullae",
    "dense": "consolidation|airspace consolidation|dense consolidation|airspace disease|an infiltrate|"
             "a pneumonic infiltrate|an airspace opacity|dense opacification",
    "bronchi": "|, with air bronchograms|, with open bronchi|, with bronchi open inside",
    "round": "nodule|lesion|round lesion|solid nodule|round nodule",
}
SENTENCES = {
    "train": {
        "effusion": [
            "@see a {size} {side} @fluid.",
            "A {size} {side} @fluid is @seen.",
            "A {size} @fluid is @seen @on_side.",
            "@see {size} @liquid @on_side.",
            "{Size} {side} @fluid[|, layering posteriorly|, in dependent position].",
            "{Size} [effusion|pleural effusion|collection of fluid] @on_side.",
            "{Size} [amount|volume] of @liquid @on_side.",
            "[Pleural fluid|Fluid|Free fluid|An effusion], {size} @amount, [|is @seen ]@on_side.",
            ("The {side} [pleural space|pleural cavity|side|chest] @shows [a {size} effusion|fluid, {size} "
             "@amount|{size} pleural fluid|a {size} fluid collection]."),
            "The {side} hemithorax [holds|shows|has] [a {size} effusion|{size} pleural fluid|a {size} collection].",
            "On the {side}[| side], @liquid is @seen, {size} @amount.",
            "On the {side}[| side] there is a {size} @fluid.",
            "The {side} lung is [compressed|displaced] by a {size} [effusion|collection of fluid]."
        ],
        "effusion both": [
            ("@see_many {size} [bilateral pleural effusions|bilateral effusions|effusions in both @spaces|fluid "
             "collections on both sides]."),
            "Bilateral [pleural effusions|effusions|pleural fluid], {size}[| in total| overall].",
            ("[Bilateral pleural effusions|Effusions of both @spaces|Effusions on both sides] are @seen, {size} [in "
             "total|overall|@amount]."),
            "Effusions in both @spaces, {size}[| overall| @amount].",
            ("{Size} [pleural effusions|effusions|amounts of pleural fluid] [on both sides|in both @spaces][|, "
             "layering posteriorly]."),
            "Both @spaces [contain|hold|show] [{size} effusions|fluid, {size} overall|{size} @liquid].",
            ("The [left and right|right and left] [pleural spaces|pleural cavities|sides] [each|both] "
             "[contain|hold|show] [{size} effusions|fluid, {size} overall|fluid, {size} in total]."),
            "@liquid, {size}, is @seen on [both sides|the left and on the right|the right and on the left]."
        ],
        "no effusion": [
            "No @fluid[| is @seen| on either side| in either hemithorax].",
            "There is no [evidence of |]@fluid[| on either side].",
            "No @liquid [|is @seen ][on either side|in the pleural spaces|in either pleural cavity].",
            "Both [costophrenic angles|@spaces] are [free of fluid|dry|clear].",
            "The [pleural spaces|pleural cavities|costophrenic angles] are [clear|free of fluid|free of effusion].",
            "The [costophrenic angles|hemithoraces] are dry.",
            "Neither [hemithorax|pleural space|pleural cavity|lung base] @shows [fluid|an effusion|pleural fluid].",
            "Neither side [contains|holds] [fluid|an effusion].",
            "The [pleural spaces|hemithoraces] [show|hold] no [effusion|fluid|pleural fluid].",
            "The @spaces contain no [effusion|pleural effusion].",
            "[Pleural spaces|Pleural cavities] without [fluid|effusion].",
            "[Pleural effusion|Pleural fluid|An effusion] is [absent|not seen|not present]."
        ],
        "cardiomegaly": [
            "The @heart is @big.",
            "@see @enlargement[|, with a cardiothoracic ratio of {ctr:.2f}].",
            "@enlargement is [seen|present|found].",
            "Cardiomegaly is noted.",
            "[Cardiac|Heart] size is increased[|, {ctr:.0%} of the thoracic width].",
            "The heart [occupies|takes up|measures] {ctr:.0%} of the thoracic width[| and is enlarged].",
            "The [size of the heart|cardiothoracic ratio|cardiac size] is increased[|, to {ctr:.2f}].",
            "[Enlarged|Markedly enlarged|Large] [heart|cardiac silhouette]."
        ],
        "no cardiomegaly": [
            "The @heart is @normal.",
            "[Heart|Cardiac] size is @normal.",
            "No @enlargement.",
            "There is no @enlargement.",
            "The cardiothoracic ratio is normal[|, {ctr:.2f}| at {ctr:.2f}].",
            "Cardiac [silhouette|dimensions|size] [within normal limits|not enlarged|not increased].",
            "Normal [heart size|cardiac dimensions|size of the heart].",
            "The cardiac [silhouette|shadow] is not enlarged.",
            "Cardiac dimensions are [normal|not increased].",
            "@enlargement is [absent|not seen]."
        ],
        "bullae": [
            "@many [thin-walled|] @bulla are @seen @upper.",
            "@see_many [large|several|multiple] @bulla @upper.",
            "@many [subpleural|] @bulla [|are @seen ]@upper[|, with thin walls].",
            "@bullous @upper.",
            "@bullous of [the upper lobes|both upper lungs|apical predominance].",
            "@bullous is @seen, [mainly|predominantly|mostly] @upper.",
            "Parts of the [upper lobes|upper lungs|apices] are [replaced|taken up] by [large|] @bulla.",
            "The [upper lobes|upper lungs|apices] [show|contain] [large|several|many] @bulla[|, with thin walls]."
        ],
        "no bullae": [
            "No @bulla[| are seen| are found| are present| in either lung].",
            ("There [is no|are no signs of|is no evidence of] [emphysema|bullous change|bullous emphysema|bullous "
             "disease]."),
            "No [evidence|sign] of [@bulla|bullous disease][| in either lung].",
            "The [lungs|upper lobes|apices] are free of [@bulla|emphysema].",
            "The lungs [show|contain] no [@bulla|emphysema|bullous disease].",
            "The lung parenchyma is [free of emphysema|free of bullae|normal, without bullae].",
            "[Bullous emphysema|Bullous disease] is [absent|not seen]."
        ],
        "consolidation": [
            "@see @dense in the {lobe}@bronchi.",
            "[Patchy|Dense] [consolidation|airspace opacification|opacification] of the {lobe}.",
            "The {lobe} shows @dense@bronchi.",
            "In the {lobe} there is @dense.",
            "Much of the {lobe} is [consolidated|opacified|occupied by consolidation].",
            "The {lobe} is [largely |partly |]consolidated@bronchi.",
            "@dense is @seen in the {lobe}.",
            "An infiltrate [occupies|fills] much of the {lobe}."
        ],
        "no consolidation": [
            "No [consolidation|infiltrate|airspace opacity|airspace disease][| is @seen].",
            "The lungs are [clear|clear of consolidation|well aerated|free of infiltrates].",
            "Both lungs are [clear|well aerated throughout|aerated throughout].",
            "There is no [focal airspace opacity|pneumonic infiltrate|pneumonic consolidation|consolidation].",
            "No lobe is [consolidated|opacified]."
        ],
        "nodule": [
            "@see a {mm} mm @round in the {lobe}.",
            "@see a [solitary|single] {mm} mm @round in the {lobe}.",
            "A @round of {mm} mm is @seen in the {lobe}.",
            "[Single|Solitary] [pulmonary |]@round in the {lobe}, [|measuring ]{mm} mm.",
            "The {lobe} [shows|contains] a {mm} mm @round.",
            "In the {lobe} there is a [solitary |]@round of {mm} mm.",
            "A @round lies in the {lobe}, measuring {mm} mm."
        ],
        "nodules": [
            ("@see_many {count} [pulmonary|scattered|lung] [nodules|lesions], the [largest|biggest] {mm} mm in the "
             "{lobe}."),
            ("{Count} [solid|round] [nodules|lesions] are [@seen|seen in the lungs], up to {mm} mm, the largest in "
             "the {lobe}."),
            "{Count} [nodules|lesions] [are scattered in|lie in] the lungs; the largest, of {mm} mm, in the {lobe}."
        ],
        "no nodules": [
            "No [pulmonary nodules|lung nodules|nodular lesions|nodule|round lesions].",
            "No [suspicious pulmonary nodule|round lesion|nodule] is [seen|found].",
            "There is no [nodule or mass|round lesion|nodule|nodular lesion] in the lungs.",
            "The lungs [show|contain] no [nodule|mass|round lesion].",
            "Neither lung [shows|contains] [a nodule|a round lesion]."
        ],
        "normal": [
            "The trachea and [main bronchi|central airways] are [patent|open].",
            "The [|thoracic ]aorta is of normal calibre.",
            "No [enlarged mediastinal lymph nodes|lymph node enlargement].",
            "No acute bony abnormality.",
            "The pulmonary arteries are well opacified.",
            "The upper abdomen is unremarkable."
        ],
        "!effusion": [
            "{Size} {side} [pleural|] effusion.",
            "[Effusion|Fluid|Free fluid] on the {side}, {size}.",
            "{Size} @liquid @on_side.",
            "Fluid in the {side} [pleural space|pleural cavity|hemithorax], {size}."
        ],
        "!effusion both": [
            "{Size} bilateral [pleural|] effusions.",
            "[Fluid|Effusions] on both sides, {size}.",
            "{Size} fluid [on both sides|in both @spaces]."
        ],
        "!cardiomegaly": [
            "Cardiomegaly.",
            "[Enlarged heart|Cardiac enlargement|Heart size increased|Enlargement of the heart]."
        ],
        "!bullae": ["@bullous @upper.", "Bullous [emphysema|lungs].", "Upper lobe bullae."],
        "!consolidation": [
            "[Consolidation|Airspace disease] of the {lobe}.",
            "{Lobe} [pneumonia|consolidation|airspace disease].",
            "Infiltrate, {lobe}."
        ],
        "!nodule": [
            "[Pulmonary|Solitary] nodule in the {lobe}.",
            "Nodule, {lobe}.",
            "Solitary [pulmonary |]@round of the {lobe}."
        ],
        "!nodules": ["{Count} [pulmonary|lung] nodules.", "[Lung|Pulmonary] nodules, {count}."],
        "!normal": [
            "Normal [chest CT|chest].",
            "No [acute |]cardiopulmonary abnormality.",
            "Unremarkable examination of the chest.",
            "No [finding|abnormal finding] in the chest."
        ],
    },
    "held-out": {
        "effusion": [
            "{Size} fluid collection within the {side} pleural space.",
            "The {side} hemithorax contains a {size} effusion.",
            "Dependent fluid, {size} in volume, is noted in the {side} pleural cavity."
        ],
        "effusion both": [
            "{Size} fluid collections within both pleural spaces.",
            "The right and left hemithorax each contain fluid, {size} overall."
        ],
        "no effusion": [
            "The pleural spaces are dry.",
            "Neither side shows pleural fluid.",
            "The pleural cavities contain no fluid."
        ],
        "cardiomegaly": [
            "Cardiac enlargement is noted.",
            "The heart size is increased, occupying {ctr:.0%} of the thoracic width."
        ],
        "no cardiomegaly": ["The heart is not enlarged.", "Cardiac dimensions are unremarkable."],
        "bullae": [
            "Large air-filled spaces with thin walls replace parts of the upper lungs.",
            "Bullous emphysema with apical predominance is noted."
        ],
        "no bullae": ["No cystic air spaces are identified.", "The lung parenchyma is free of bullous disease."],
        "consolidation": [
            "Dense opacification of the {lobe} with open bronchi inside.",
            "An airspace opacity occupies much of the {lobe}."
        ],
        "no consolidation": ["The lungs are well aerated throughout.", "No pneumonic infiltrate is identified."],
        "nodule": [
            "A round lesion measuring {mm} mm lies in the {lobe}.",
            "Within the {lobe}, a solitary {mm} mm nodule is noted."
        ],
        "nodules": ["{Count} round lesions are scattered in the lungs; the biggest, in the {lobe}, measures {mm} mm."],
        "no nodules": ["No round lesion is identified in the lungs.", "The lungs show no nodular lesion."],
        "normal": [
            "The central airways are open.",
            "The thoracic aorta is not dilated.",
            "No lymphadenopathy.",
            "The skeleton is intact."
        ],
        "!effusion": ["Pleural fluid on the {side}, {size}."],
        "!effusion both": ["Pleural fluid on both sides, {size}."],
        "!cardiomegaly": ["Increased heart size."],
        "!bullae": ["Bullous lung disease."],
        "!consolidation": ["Airspace disease, {lobe}."],
        "!nodule": ["Solitary nodule, {lobe}."],
        "!nodules": ["Several lung nodules ({count})."],
        "!normal": ["No abnormality identified.", "Chest within normal limits."],
    },
}
SIZES = {
    "train": {
        "small": ["small", "minor", "minimal"],
        "moderate": ["moderate", "medium-sized"],
        "large": ["large", "extensive", "massive"],
    },
    "held-out": {"small": ["minor"], "moderate": ["medium-sized"], "large": ["extensive"]},
}
