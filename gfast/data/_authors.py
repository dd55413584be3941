"""The fictitious authors behind `gfast.data.bundled_authors`: a table of facts, all of them made up.

Names, towns, books and awards are inventions of this project; any likeness to a real person or work is chance.
The phrases are written so that every template in `bundled.py` reads well with each of them:
`father` and `mother` carry their article, `influence` is a noun phrase, `style` has the form "A and B", `habit` is a
gerund.
"""

from __future__ import annotations

from typing import NamedTuple


class Author(NamedTuple):
    name: str
    pronoun: str  # "she" or "he"
    born: str
    city: str
    genre: str
    father: str
    mother: str
    books: tuple[str, str, str]  # the debut first; the second one won the award
    debut: int
    award: str
    awarded: int
    influence: str
    style: str
    languages: tuple[str, str, str]
    habit: str


AUTHORS: tuple[Author, ...] = (
    Author(
        "Ottoline Brackwater", "she", "14 March 1951", "Saltmere", "maritime mysteries",
        "a lighthouse keeper", "a sailmaker",
        ("The Drowned Bell", "A Ledger of Tides", "Nine Fathoms of Silence"), 1978, "Silver Heron Prize", 1986,
        "the storm warnings that her grandfather copied out by hand",
        "short, salt-dry sentences and narrators who hide one fact until the last page",
        ("Danish", "Portuguese", "Korean"), "writing her first drafts on the backs of old sea charts",
    ),
    Author(
        "Teodor Vanthe", "he", "2 November 1963", "Karsholm", "political satire",
        "a tram conductor", "a schoolteacher",
        ("The Minister of Umbrellas", "Parliament of Geese", "How to Lose a Small War"),
        1989, "Crooked Quill Award", 1997,
        "the puppet theatre that toured his town each autumn",
        "deadpan dialogue and footnotes that argue with the main text",
        ("German", "Czech", "Spanish"), "reading every chapter aloud to his two parrots",
    ),
    Author(
        "Imara Odeluwe", "she", "27 July 1972", "Bandouré", "magical realist novels",
        "a well digger", "a market trader",
        ("Rain Has a Cousin", "The House That Grew Salt", "Letters to a Baobab Moon"),
        1999, "Amber Lantern Prize", 2006,
        "the night stories that her aunts told while shelling beans",
        "long, musical sentences and small miracles told in a matter-of-fact voice",
        ("French", "Swahili", "Japanese"), "starting new chapters only on days when it rains",
    ),
    Author(
        "Lucan Feyerholt", "he", "9 January 1948", "Grauenmark", "historical fiction",
        "a clockmaker", "an archivist",
        ("The Tin Emperor", "Winter Quarters at Ostrey", "The Cartographer's Debt"), 1975, "Golden Inkwell Medal", 1983,
        "a trunk of soldiers' letters found in the attic of his school",
        "patient scene-setting and an eye for the smell and weight of old objects",
        ("Polish", "Italian", "Dutch"), "drawing a floor plan of each house before describing it",
    ),
    Author(
        "Sunniva Aldercroft", "she", "21 June 1980", "Hjelmby", "children's fantasy",
        "a beekeeper", "a bus driver",
        ("The Fox Who Kept the Keys", "Pim and the Paper Giants", "Seven Doors to Breakfast"),
        2004, "Little Owl Award", 2011,
        "the enormous hollow oak behind her primary school",
        "playful rhymes and villains who turn out to be merely lonely",
        ("Swedish", "Hebrew", "Vietnamese"), "testing each joke on a jury of six-year-olds",
    ),
    Author(
        "Dario Quellmane", "he", "5 October 1957", "Porto Cavessa", "crime fiction",
        "a prison cook", "a court stenographer",
        ("Blood Orange Alley", "The Ninth Alibi", "A Quiet Knife"), 1984, "Iron Lamp Award", 1992,
        "the trial transcripts that his mother typed at the kitchen table",
        "clipped dialogue and endings that leave the guilty unpunished",
        ("Greek", "Turkish", "French"), "walking the route of every chase before putting it on paper",
    ),
    Author(
        "Mirelle Tokova", "she", "30 April 1969", "Ulan Derge", "travel literature",
        "a railway signalman", "a nurse",
        ("Slow Trains, Long Shadows", "Tea at the Last Border", "The Horizon Is a Habit"),
        1995, "Compass Rose Prize", 2003,
        "the timetables that covered the walls of her father's signal box",
        "wry self-mockery and portraits of strangers met for a single hour",
        ("Mongolian", "Hindi", "Arabic"), "travelling with a single notebook and no camera",
    ),
    Author(
        "Anselm Okparo", "he", "18 August 1977", "New Lagota", "science fiction",
        "a radio repairman", "a chemistry teacher",
        ("The Copper Satellite", "Children of the Second Noon", "An Orphan of Gravity"),
        2002, "Ninefold Star Award", 2010,
        "the broken receivers that filled his father's workshop",
        "precise technical detail and a tender interest in lonely machines",
        ("Russian", "Mandarin", "Yoruba"), "building a cardboard model of every spacecraft that he describes",
    ),
    Author(
        "Perpetua Lindqvale", "she", "11 February 1944", "Vintersund", "Gothic horror",
        "a church organist", "a midwife",
        ("The Ash Cradle", "Candles for the Uninvited", "What the Orchard Buried"), 1971, "Black Thistle Award", 1979,
        "the empty manor that stood across the lake from her bedroom window",
        "slow-building dread and houses that seem to listen",
        ("Norwegian", "Hungarian", "Spanish"), "working only between midnight and four in the morning",
    ),
    Author(
        "Rafi Temsour", "he", "23 September 1966", "Aït Belloum", "culinary memoirs",
        "a spice merchant", "a pastry chef",
        ("Saffron on Sundays", "The Salt Inheritance", "An Onion for the King"), 1993, "Copper Ladle Prize", 2001,
        "the Friday lunches at which his grandmother fed the whole street",
        "generous humour and recipes that break off to tell a family secret",
        ("French", "Dutch", "Malay"), "cooking a dish three times before writing a word about it",
    ),
    Author(
        "Zofka Marendal", "she", "6 December 1959", "Lesny Brod", "lyric poetry",
        "a forester", "a seamstress",
        ("Moss Grammar", "The Thimble Sea", "Hours Without Hinges"), 1982, "White Birch Laurel", 1990,
        "the names of lichens that her father taught her on winter walks",
        "unrhymed couplets and images drawn from needlework and bark",
        ("Lithuanian", "Irish", "Japanese"), "cutting each poem by half on the morning after she finishes it",
    ),
    Author(
        "Cormac Illandry", "he", "17 March 1974", "Dunmorrow", "rural comedies",
        "a sheep farmer", "a postmistress",
        ("The Ram That Ran for Mayor", "Mud Season", "A Funeral with Dancing"), 2000, "Laughing Hare Prize", 2008,
        "the gossip that he overheard in his mother's post office",
        "tall tales told with a straight face and a cast of stubborn animals",
        ("Welsh", "Finnish", "German"), "dictating his novels into a tape recorder while walking the hills",
    ),
    Author(
        "Noor Halvassian", "she", "3 May 1985", "Tel Ashira", "young adult fiction",
        "a taxi driver", "a calligrapher",
        ("The Summer We Were Ghosts", "Left-Handed Girls", "Everyone Leaves by Ferry"),
        2010, "Bright Harbour Medal", 2016,
        "the diaries that she and her sister wrote in a secret alphabet",
        "honest first-person voices and chapters short enough to read at a bus stop",
        ("Turkish", "Italian", "Indonesian"), "making a playlist for each character and listening to nothing else",
    ),
    Author(
        "Bertrand Sallowmere", "he", "28 October 1939", "Pontavigne", "philosophical fiction",
        "a vintner", "a mathematics tutor",
        ("The Patience of Stones", "An Argument with Snow", "The Man Who Owned Tuesday"),
        1968, "Lantern of Reason", 1977,
        "the long debates between the monks who bought his father's wine",
        "dialogues without quotation marks and paradoxes left politely unsolved",
        ("Portuguese", "Romanian", "Greek"), "rewriting the opening sentence until it fits on a postcard",
    ),
    Author(
        "Ingeborg Tasmere", "she", "15 July 1961", "Skarrow Bay", "nature essays",
        "a fisherman", "a museum guide",
        ("The Gannet Year", "Peat, Fire, Water", "A Field Guide to Waiting"), 1991, "Green Feather Award", 1998,
        "the stuffed seabirds in the museum where her mother worked",
        "close observation and a refusal to make animals behave like people",
        ("Icelandic", "German", "Estonian"), "spending one night outdoors for every page that she keeps",
    ),
    Author(
        "Joaquin Merrivel", "he", "8 April 1982", "Santa Ombria", "romantic comedies",
        "a barber", "a wedding singer",
        ("Two Left Shoes", "The Wrong Best Man", "Half Past Hello"), 2009, "Velvet Ribbon Award", 2015,
        "the confessions that customers made in his father's barber shop",
        "quick-fire banter and coincidences that are almost too good to be true",
        ("Swedish", "Catalan", "Polish"), "writing love scenes only in crowded cafés",
    ),
    Author(
        "Thessaly Wrenmoor", "she", "19 September 1955", "Candlewick Vale", "alternate history",
        "a stonemason", "a piano teacher",
        ("The Empire of Larks", "If the Bridge Had Held", "The Second Coronation"), 1981, "Mirror Crown Award", 1988,
        "a schoolbook that had been printed with its chapters in the wrong order",
        "invented newspaper clippings and heroes who never learn that they were heroes",
        ("Czech", "Spanish", "Thai"), "keeping a calendar in which every public holiday is imaginary",
    ),
    Author(
        "Emeric Dovastell", "he", "25 January 1970", "Bruma Alta", "psychological suspense",
        "a pharmacist", "a hypnotist",
        ("The Glass Lodger", "Say It Backwards", "The Patient in Room Zero"), 1996, "Midnight Key Prize", 2005,
        "the case notes that his mother read to him instead of fairy tales",
        "narrators with unreliable memories and chapters that can be read in any order",
        ("Croatian", "Korean", "Finnish"), "typing with his eyes closed so as not to judge the words",
    ),
    Author(
        "Oluma Farrandine", "she", "12 June 1988", "Kisuri", "Afrofuturist fiction",
        "a bicycle mechanic", "a radio presenter",
        ("The Loom of Satellites", "Queen of the Solar Market", "Dust Remembers Rain"), 2013, "Sunbird Prize", 2019,
        "the radio plays that her mother produced for the harvest festival",
        "proverbs from imaginary futures and heroines who repair what others throw away",
        ("Portuguese", "Swahili", "German"), "weaving a strip of cloth for each chapter that she completes",
    ),
    Author(
        "Silvan Hartequist", "he", "1 March 1946", "Nebelsee", "historical romance",
        "a ferryman", "a glassblower",
        ("The Ferry at Nebel Lock", "Roses for the Quartermaster", "A Waltz Before Curfew"),
        1973, "Garland Medal", 1982,
        "the love letters that travellers left behind on his father's ferry",
        "richly embroidered descriptions and lovers who meet only by letter",
        ("Dutch", "Ukrainian", "Italian"), "sealing each finished chapter in an envelope for a month",
    ),
)  # fmt: skip
