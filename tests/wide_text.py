"""A wide set of text for the tokeniser: documentation of whatever is installed, the same with mistakes, and strings made to be nasty."""
import random
import re
import sysconfig
from hashlib import md5
from pathlib import Path


def _share(text: str) -> float:
    "A number from 0 to 1 that depends on `text` alone"
    return int(md5(text.encode()).hexdigest()[:8], 16)/2**32


def documentation(count: int) -> list[str]:
    "Up to `count` lines of three words or more from the documentation of the standard library and of installed packages"
    shares, found = {'.py': .05, '.txt': .3, '.md': 1, '.rst': 1, 'METADATA': 1}, set()
    for root in (Path(sysconfig.get_paths()[name]) for name in ('stdlib', 'purelib')):
        for path in root.rglob('*'):
            name, kind = path.relative_to(root).as_posix(), path.suffix or path.name
            if _share(name) >= shares.get(kind, 0) or root.name != 'site-packages' and re.search('(site|dist)-packages', name): continue
            try: text = path.read_text('utf-8')
            except (UnicodeDecodeError, OSError): continue
            if kind == '.py': text = '\n'.join(re.findall('"""(.*?)"""', text, re.S))
            lines = {line for line in map(str.strip, text.splitlines()) if len(line) <= 300 and len(re.findall('[A-Za-z]{2,}', line)) > 2}
            found |= set(sorted(lines, key=_share)[:300])             # no file, such as a word list, makes up the set
    return sorted(found, key=lambda line: (_share(line), line))[:count]


def with_mistakes(lines: list[str], seed: int = 0) -> list[str]:
    "The same lines, each with a few characters lost, doubled elsewhere or put in"
    rng, out = random.Random(seed), []
    signs = list(" .,'-/&:;!?()\"@#$%+*_=<>[]~^|{}`0123456789aeinstTS’“”–") + sorted({c for line in lines for c in line})[::20]
    for line in lines:
        text = list(line[:120])
        for _ in range(rng.randint(1, 4)):
            i, j, what = rng.randrange(len(text) + 1), rng.randrange(len(text) + 1), rng.random()
            if what < .3: text[i:i+1] = []
            elif what < .75: text.insert(i, rng.choice(signs))
            else: text[i:i] = text[j:j + rng.randint(1, 6)]
        out.append(' '.join(''.join(text).split()))
    return [line for line in out if line]


# ---- strings made to be nasty -----------------------------------------------------------------------------------

PLAIN = 'a man in red shirt is standing on the beach two dogs running over snow near tree The He she has It not was of'.split()
NAMES = 'dog Red cafe New-York map2 x README my_file São Zoë IMG_0042 a1 B HTTP user john.smith naïve data-v2 Résumé'.split()
WORDS = PLAIN + NAMES
ENTITIES = ('amp lt gt quot apos nbsp mdash ndash eacute copy hellip rsquo ldquo rdquo euro pound #39 #8217 #x27 #x2019 AMP Lt uuml Yuml '
            'times deg frac12 bull szlig').split()
SCHEMES = 'http:// https:// HTTP:// ftp:// www. http://www. // file:// mailto: git+https:// WWW.'.split() + ['', '']
SITES = 'example a my-site flickr en.wikipedia x.y.z Example news24 localhost 127.0.0.1 café'.split()
PLACES = ['', '', *'/ :8080 /a/b.html /photos/123/ /?q=a+b&c=d /~me/#top /wiki/Dog_(animal) /a,b;c /index.php?id=1%20 /A.JPG /{i}'.split()]
TOPS = 'com org net edu gov io co.uk de info COM fr'.split()
FACES = r"""^_^ ^^ -_- o_O (^_^) (-_-) ('-') >_< =_= <3 </3 \o/ (: xD :-)) T_T (='.'=) ¯\_(ツ)_/¯ (o) *_* ~_~ ('_') (x_x)""".split()
SHORT = """Mr mrs Dr st St vs no No etc jr Jr ave Inc co Jan feb e.g i.e a.m P.M U.S u.s.a Ph.D D.C approx ca ft in oz lb fig Figs pp p vol
 ed al Prof gen Rev Sgt Mt Calif tel ext dept max min sec hr Bros Ltd cf viz Tues Sept Ill ill mass Wash ind B.A M.Sc N J.R.R w c.f esp incl
 op art Pty mfg""".split()
CUT = """cannot gonna Wanna GOTTA gimme lemme dunno kinda more'n d'ye whaddya wanna-be cannot. cannot've o'er ne'er ma'am y'all've
 shouldn't've o'clock O'Neil D'Arcy L'Oréal c'est qu'il jack-o'-lantern will-o'-the-wisp mother-in-law's fo'c'sle bo's'n
 ol' rock'n'roll""".split()
PHONES = ['(555) 123-4567', '555-1234', '+1 555 123 4567', '+49 89 1234567', '555.123.4567', '1-800-555-1234', '(0)20 7946 0958',
          '(020)7946-0958', '++49 30 123456', '0800 123 456']
CODES = """v1.2.3 1.2.3-rc1 3e-5 1e10 0x1F 1_000 1'000 10^6 2² 10⁻¹² x=3 n=5 3.14.15 1,2,3 1;2 No.5 #1 1/2/3/4 007 B-52 F16 MP3 4x4
 3-D 24/7/365 ٣٤ ٣٫٤ １２ Ⅷ ①""".split()
TAGS = ['b', 'br', 'unk', 'a href="x"', "a href='x'", 'a href=x', 'img src="a b" alt=""', 'div class="a" id=b', 'p align', 'step text',
        'DOCTYPE html', '!-- x --', 'br /', 'person', 'a-b', 'a_b', 'start', 'e.g.', 'int>, <str', '3', 'x y="z" w']
QUOTES = ['""', "''", ('``', "''"), '“”', '‘’', '«»', '„“', '‚‘', '‹›', ('"', ''), ('', '"'), ("'", ''), ('&quot;', '&quot;'), '``',
          ("''", "''"), '「」', '″″', '‟”', ('“', '"'), ('\\"', '\\"'), ("'\"", "\"'")]
BRACKETS = ['()', '[]', '{}', '<>', '««', ('((', '))'), ('-LRB-', '-RRB-'), ('-lsb-', '-rsb-'), ('[[', ']]'), ('(', ''), ('', ')'),
            '（）', '【】', '‹›', ('<<', '>>')]
DASHES = '- -- --- ---- ----- – — ― − ‐ ‑ ‒ ~ _ __ … .. ... .... · • | / \\ // &ndash; => -> <- * ** + &'.split() + ['- -', '. . .']
ENDINGS = """txt jpg JPG png gif py c h cpp html tar.gz gz zip pdf doc docx exe java class json md yml csv mp3 mp4 mov avi xml sql ps php
 jpeg bak so.1 ipynb toml rs sh""".split()
SCRIPTS = ['abcdéüñçøßœæåžščřłńőİıſﬁ', '日本語犬は草中国한국어', 'собакаИДЁТ', 'ελσκύλοςΩ', 'كلبשלוםहिन्दीไทย']


def _kinds(rng: random.Random) -> dict:
    "Functions that make one nasty string each, by kind"
    pick, number = rng.choice, rng.randint
    def maybe(*options): return pick([*options, '', ''])
    def amount(): return pick([str(number(0, 9)), str(number(10, 3000)), f'{number(1, 999)},{number(0, 999):03d}',
                               f'{number(0, 99)}.{number(0, 99)}', f'.{number(0, 99)}',
                               f'{number(1, 99)},{number(0, 999):03d},{number(0, 999):03d}.{number(0, 99):02d}'])
    def currency(): return pick([
        pick('$£€¥¢₤₹₩¤') + pick(['', ' ']) + amount() + maybe('m', 'bn', 'k', '-a-day', '/h', ' million', '.-', '+', 's'),
        pick(['US$', 'A$', 'C$', 'HK$', 'us$', 'R$', 'US $', 'Rs.', 'EUR ', 'USD']) + amount(),
        amount() + maybe(' ') + pick(['$', '€', '£', '¢', 'EUR', '%', '‰', ' per cent', 'c', 'p'])])
    def entity(): return pick(['&', '&', '& ']) + pick(ENTITIES) + pick([';', ';', ''])
    def address(): return pick(SCHEMES) + pick(SITES) + pick(['.', '.', '']) + pick(TOPS) + pick(PLACES)
    def mail(): return (pick(NAMES + ['first.last', 'me+tag', 'a_b', 'x-y', '<me', '"me"'])
                        + pick(['@', '@', '@', ' @ ', '[at]', '(at)', '@@']) + pick(['example', 'mail.example', 'x-y', 'Host'])
                        + pick(['.', '.', '']) + pick(TOPS) + maybe('>', ',', ';', '...'))
    def social(): return pick('@ # @_ ## #1 r/ @\t /u/ ~ ^ * % + ='.split(' ')) + pick(NAMES + ['NoFilter', 'dog_lover', '2020', 'été'])
    def emoji(): return ''.join(pick('😀🐕❤️👍🏽👨‍👩‍👧🇩🇪☺☀✈★♥→©™®°•✓½⅓²☎🎉') for _ in range(number(1, 3)))
    def smiley(): return pick([maybe('>', '<', 'O', '}') + pick(':;=8xX') + maybe('-', 'o', '^', "'", '*', "'-")
                               + pick('()DdPpO[]|/\\@3*{}$>') + maybe(')', ' '), pick(FACES)])
    def bracket():
        left, right = pick(BRACKETS)
        return left + maybe(' ') + pick(NAMES + [amount(), 's', '?', 'left', 'e.g.', 'sic', '...', 'a, b', '']) + maybe(' ') + right
    def contraction():
        q = pick("''''''’’`‘ʼ´′")
        return pick([pick('do is ca wo Was DID ai sha Have could mus n in'.split()) + pick('nN') + q + pick('tT'), pick(CUT),
                     pick(WORDS + 'I you they who let dogs James 1990 it that'.split()) + q
                     + maybe(*'s m d ll re ve S LL clock em all am know'.split()),
                     maybe('rock ', 'he ') + q + pick('tis twas n em til cause cuz 90s 95 bout Til N Tis twere t'.split()) + maybe(q, ' ')])
    def abbreviation(): return (pick(SHORT) + pick(['.', '.', '.', '', '..', '.,', '.)', ".'s", '.-based', '. ', '...', '.;', '.:'])
                                + maybe(' 5', ' Five', ' The', ' the', '5', ' (a)', ' Smith', ' - a', ' "a', ' ,', ' <b>'))
    def numbers(): return pick([
        amount(), amount() + pick('- – — / : x × + = ~ ^ , .. ... -to-'.split() + [' - ', ' x ']) + amount(), pick(PHONES), pick(CODES),
        amount() + pick("""st nd rd th s 's % ° °C km mph am ft ' " -inch D -year-old K x ² º ½ ⁄2 + # * ) .""".split() + [' p.m.']),
        pick('-+±#~<>≥=№') + amount(), f'{number(0, 24)}:{number(0, 59):02d}' + maybe('pm', ' am', ':30', 'h', 'P.M.', '-4:00'),
        f'{number(0, 31)}{pick("-/.")}{number(1, 12)}{pick("-/.")}{pick(["95", "1995", "2020"])}',
        f'{number(1, 30)}{pick([" ", "-", ""])}{number(1, 9)}{pick("/⁄")}{number(2, 9)}'])
    def quoted():
        left, right = pick(QUOTES)
        return left + maybe(' ') + ' '.join(rng.choices(WORDS, k=number(1, 3))) + maybe('.', ',', '!', "'s", ' ') + right
    def dash(): return pick(WORDS + [amount()]) + maybe(' ') + pick(DASHES) + maybe(' ') + pick(WORDS + [amount()])
    def file(): return (maybe('./', '../', '/', 'C:\\', '~/', '/usr/', 'a/b/', '"', 'src/', 'file:') + pick(NAMES)
                        + pick(['.', '.', '.', '-', '_', '']) + pick(ENDINGS)
                        + maybe(',', '.', ':', '?', '"', ')', '/', ' and', ';', ':12', '#L3', '()'))
    def markup(): return pick([
        '<' + maybe('/', '!', '?', ' ') + pick(TAGS) + maybe(' ', '/') + pick(['>', '>', '>', '']),
        pick('** * _ __ ` `` ~~ == ``` # > | >>> :func:` $ $$ \\ {{ %( @ :: !'.split() + ['## ', '- ', '* ', '... ']) + pick(WORDS)
        + maybe(*'** * _ ` `` ~~ () [0] =1 \\n )s }} % | \\* [a](b)'.split())])
    def other(): return pick([
        ''.join(pick(pick(SCRIPTS)) for _ in range(number(1, 8))),
        pick(PLAIN) + pick('\u00a0\u2009\u202f\u3000\u200b\ufeff\u00ad\u200d\u2060\u0301\ufe0f\u200e') + pick(PLAIN), 'cafe\u0301',
        pick('，。！？、：；“”…—·「」（）《》¡¿§¶†‡※°ªº²³µ×÷≤≥≠∞√∑∈→←↔⇒■□●○◆') + maybe(' ') + pick(PLAIN)])
    return dict(currency=currency, entities=entity, addresses=address, email=mail, social=social, emoji=emoji, smileys=smiley,
                brackets=bracket, contractions=contraction, abbreviations=abbreviation, numbers=numbers, quotes=quoted, dashes=dash,
                files=file, markup=markup, unicode=other)


def adversarial(count: int, seed: int = 0) -> dict[str, list[str]]:
    "Kind -> up to `count` different captions: plain words with one or two strings of this kind among them, and perhaps one of another"
    rng = random.Random(seed)
    kinds, found = _kinds(rng), {}
    def caption(make) -> str:
        words = rng.choices(PLAIN, k=rng.randint(0, 6))
        more = [make] + [make]*(rng.random() < .3) + [rng.choice(list(kinds.values()))]*(rng.random() < .15)
        for one in more: words.insert(rng.randint(0, len(words)), one())
        text = words[0]
        for word in words[1:]: text += (' ' if rng.random() < .95 else rng.choice(",.;:/-&'\"(")) + word
        return text + rng.choice(['', '', '.', ' .', '!', '?', ',', '"', ')'])
    for kind, make in kinds.items():
        lines = [' '.join(caption(make).splitlines()) for _ in range(count)]
        found[kind] = list(dict.fromkeys(line for line in lines if line.strip()))
    return found
